"""Phases of a run that makes its own training data: which models are in memory, and what to change."""

from __future__ import annotations

import dataclasses

import gguf
import pytest
from test_plan import run_of

from tuna_peft.export.gguf.tensors import TYPES
from tuna_peft.limits import GIB
from tuna_peft.planning import storage
from tuna_peft.planning.advice import advise
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.memory import Precision
from tuna_peft.planning.plan import make_plan
from tuna_peft.planning.shapes import KNOWN
from tuna_peft.planning.spec import Device, JudgeSpec, LocalModel, MergeSpec, SampleSpec, TeacherSpec
from tuna_peft.planning.workload import Row, Workload

TEACHER = LocalModel("teacher", KNOWN["llama-2-13b"], Precision("none", True, 2))
PROMPTS = Workload((Row(100, (200,) * 4),), 1000, "by hand")
QUESTIONS = Workload((Row(1500, (0,)),), 1000, "by hand")


def run_with_feedback(**how):
    """The tests' run, whose second stage makes its training data."""
    sft, rank = run_of().stages
    return dataclasses.replace(run_of(), stages=(sft, dataclasses.replace(rank, prompt_workload=PROMPTS, **how)))


def phases(run, gpu="A100 80GB"):
    return {phase.name: phase for phase in make_plan(run, Device.of(find_gpu(gpu))).phases}


def test_a_stage_samples_with_the_adapters_of_those_before_it():
    sample = SampleSpec(4, 256, 32, attempts=3)
    found = phases(run_with_feedback(sample=sample))
    assert list(found) == ["train sft", "sample rank", "train rank", "evaluate: ranking", "evaluate: graded"]
    drawn = found["sample rank"]
    assert drawn.parts["frozen adapters, 32-bit and concatenated"] == 6 * run_of().stages[0].adapter.parameters
    assert drawn.parts["keys and values of 32 x 356 tokens"] > 0 and drawn.note == "up to 3 attempts"
    assert drawn.tokens == 1000 * (100 + 4 * 256) and drawn.smallest < drawn.allocated
    few = phases(run_with_feedback(sample=dataclasses.replace(sample, batch_size=4)))["sample rank"]
    assert few.needed < drawn.needed and few.hours > drawn.hours


@pytest.mark.parametrize(
    "how",
    [{"teacher": TeacherSpec(TEACHER, 4096)}, {"judge": JudgeSpec(TEACHER, QUESTIONS, 2048, 8)}],
    ids=["teacher", "judge"],
)
def test_a_teacher_and_a_judge_are_held_beside_the_run_s_own_model(how):
    found = phases(run_with_feedback(**how))
    [name] = [name for name in found if name.startswith(("score", "judge"))]
    assert found[name].parts["teacher, 16-bit"] == pytest.approx(2 * 13.016e9, rel=1e-3)
    assert found[name].parts["base layers, nf4"] == found["train rank"].parts["base layers, nf4"]
    assert found[name].hours > 0
    assert not any("teacher" in part for part in found["train rank"].parts)  # it is freed before training


def test_a_model_beside_the_run_s_own_is_downloaded_once():
    run = run_with_feedback(teacher=TeacherSpec(TEACHER, 4096), judge=JudgeSpec(TEACHER, QUESTIONS, 2048, 8))
    there, here = (
        make_plan(changed, Device.of(find_gpu("a100"))).disk
        for changed in (run, dataclasses.replace(run_of(), merge=run.merge))
    )
    assert sum(there.values()) - sum(here.values()) == pytest.approx(2 * 13.016e9, rel=1e-3)


def test_what_decides_is_changed_first_and_with_the_key_that_the_recipe_has():
    judge = JudgeSpec(TEACHER, QUESTIONS, 2048, 8)
    run = run_with_feedback(sample=SampleSpec(4, 256, 32), judge=judge)
    rounds = [dataclasses.replace(run.stages[1], name=f"rank-{number}", section="rank") for number in (1, 2)]
    plan = make_plan(dataclasses.replace(run, stages=(run.stages[0], *rounds)), Device.of(find_gpu("RTX 4090")))
    assert plan.largest.name.startswith("judge rank-")
    changes = advise(plan)
    assert changes[0].overrides == ("stages.rank.data.judge.batch_size=1",)
    assert changes[1].overrides == ("stages.rank.data.judge.quantization=nf4",)
    assert changes[-1].fits and not any("lora.r" in override for change in changes for override in change.overrides)


def test_a_batch_is_only_made_as_small_as_it_must_be():
    run = run_with_feedback(sample=SampleSpec(4, 1024, 64))
    run = dataclasses.replace(run, stages=tuple(dataclasses.replace(one, batch_size=1) for one in run.stages))
    plan = make_plan(run, Device.of(find_gpu("RTX 4090")))
    assert plan.largest.name == "sample rank" and not plan.fits
    [change] = advise(plan)
    assert change.fits and change.overrides == ("stages.rank.data.sample.batch_size=16",)
    twice = make_plan(run_with_feedback(sample=SampleSpec(4, 1024, 32)), plan.device)
    assert next(phase for phase in twice.phases if phase.name == "sample rank").needed > plan.device.memory


def test_a_stack_as_teacher_keeps_its_own_quantization():
    stack = dataclasses.replace(TEACHER, adapters=10**6)
    assert TEACHER.in_4_bits().precision.method == "nf4" and stack.in_4_bits() == stack
    assert sum(stack.parts.values()) - sum(TEACHER.parts.values()) == 6e6


def test_sizes_of_gguf_weights_are_those_of_llama_cpp():
    assert set(storage.GGUF) == set(TYPES)
    for kind, (format, _) in TYPES.items():
        block, size = gguf.GGML_QUANT_SIZES[format]
        assert storage.GGUF[kind] == size / block
    assert storage.gguf_head("q4_0") == storage.GGUF["q8_0"] and storage.gguf_head("f16") == 2


def test_gguf_files_take_disk_and_a_tensor_of_main_memory():
    run = dataclasses.replace(run_of(), merge=MergeSpec(2.0, ("q8_0", "f16")))
    plan = make_plan(run, Device.of(find_gpu("a100")))
    assert plan.disk["GGUF, q8_0"] == pytest.approx(6.738e9 * 34 / 32, rel=1e-3)
    assert plan.ram["GGUF, f16"] - plan.ram["GGUF, q8_0"] == pytest.approx(32000 * 4096 * (2 - 34 / 32))


def test_a_merged_model_that_does_not_fit_on_the_gpu_may_be_offloaded_to_disk():
    run = dataclasses.replace(run_of(), compared=(300,) * 16)
    large, small = (make_plan(run, Device.of(find_gpu(gpu))) for gpu in ("A100 80GB", "RTX 3060"))
    [name] = set(small.disk) - set(large.disk)
    head = 4 * 32000 * 4096  # in fp32, while it is used
    assert small.disk[name] == pytest.approx(2 * 6.738e9 - 0.9 * 11.2 * GIB + head, rel=1e-2)
    assert max(phase.needed for phase in small.phases if phase.name == "compare exports") < 11.7 * GIB
    assert small.ram["comparing exports: logits of the unmerged adapters"] > 16 * 300 * 32000 * 2


def test_a_comparison_that_decides_is_left_out():
    run = dataclasses.replace(run_of("llama-3.1-8b", batch_size=1), compared=(60_000,), evaluation={})
    plan = make_plan(run, Device.of(find_gpu("RTX 4080")))
    assert plan.largest.name == "compare exports" and not plan.fits
    assert advise(plan)[-1].fits and advise(plan)[0].overrides == ("export.divergence_prompts=0",)
