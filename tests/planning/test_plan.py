"""A plan's phases, the changes that it proposes, and GPUs by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tuna_peft.errors import UserError
from tuna_peft.limits import GIB
from tuna_peft.planning.advice import advise, smallest_gpu
from tuna_peft.planning.cpu_speed import cpu_speed
from tuna_peft.planning.flops import LAUNCHES_A_LAYER, SECONDS_A_LAUNCH, decode_hours, forward_flops
from tuna_peft.planning.gpus import GPUS, Gpu, find_gpu
from tuna_peft.planning.memory import Adapter, Precision
from tuna_peft.planning.plan import Phase, Plan, make_plan
from tuna_peft.planning.shapes import KNOWN, ModelShape
from tuna_peft.planning.spec import Device, MergeSpec, RunSpec, StageSpec, TaskSpec
from tuna_peft.planning.workload import Row, Workload, packed_pass, padded_pass

ROWS = Workload((Row(100, (200, 50)), Row(40, (10, 20, 30))), 1000, "by hand")


def run_of(model="llama-2-7b", **changes):
    shape = KNOWN[model]
    adapter = Adapter(16, shape.adapter(16, "all-linear"), 7)
    values = {
        "workload": ROWS, "adapter": adapter, "batch_size": 8, "accumulation": 2, "max_tokens": None,
        "activation_memory": "full", "optimizer": "adamw_torch", "epochs": 2, "max_steps": -1, **changes,
    }  # fmt: skip
    stages = tuple(StageSpec(name, kind, **values) for name, kind in (("sft", "sft"), ("rank", "ranking")))
    evaluation = {"ranking": TaskSpec(ROWS, batch_size=16), "graded": TaskSpec(ROWS, 64, batch_size=16)}
    return RunSpec(model, shape, Precision("nf4", True, 2), stages, evaluation, MergeSpec())


def test_a_continued_adapter_takes_the_place_of_the_one_before():
    sft, rank = run_of().stages
    small = dataclasses.replace(rank, adapter=Adapter(8, rank.adapter.parameters / 2, 7))
    again = dataclasses.replace(small, name="rank-2", continues=True)
    run = dataclasses.replace(run_of(), stages=(sft, small, again, dataclasses.replace(rank, name="last")))
    assert run.below(1) == run.below(2) == [sft.adapter]
    assert run.below(3) == [sft.adapter, small.adapter]
    assert run.stack(4) == [sft.adapter, small.adapter, rank.adapter]


def test_a_reference_costs_one_forward_pass_for_each_example():
    run = run_of()  # two epochs
    sft, rank = run.stages
    compared = dataclasses.replace(run, stages=(sft, dataclasses.replace(rank, reference=True)))
    device = Device.of(find_gpu("A100 80GB"))
    without, with_it = (make_plan(each, device).phases[1] for each in (run, compared))
    passes = forward_flops(run.shape, ROWS.tokens, ROWS.response_tokens) * ROWS.total
    assert with_it.flops - without.flops == pytest.approx(passes, rel=1e-6) and with_it.peak == without.peak


def test_the_largest_pass_holds_the_longest_rows_within_the_budget():
    rows = ROWS.rows
    assert packed_pass(rows, 8, None).positions == 8 * 352  # 350, padded to a multiple of 8
    assert packed_pass(rows, 8, 1000).positions == 1000  # shorter rows fill the budget
    assert packed_pass(rows, 8, 360).positions == 360
    assert packed_pass(rows, 1, 10_000).positions == 352
    assert padded_pass(rows, 4).positions == 4 * 304
    batch = packed_pass(rows, 2, None)
    assert batch.targets == 2 * 250
    assert batch.keys == 2 * (100 + 300 + 150)


def test_a_plan_fits_by_what_it_needs_and_not_by_what_it_would_like():
    """More activations are kept where there is room, so a phase may plan to use more than it needs."""
    small = Phase("small", {"weights": 5.0, "kept": 6.0}, margin=1.0, needed=8.0, smallest=6.0, hours=2.0)
    large = Phase("large", {"weights": 9.0}, margin=0.0, needed=9.0, smallest=9.0, hours=None)
    for memory, fits in ((8.999, False), (9.0, True), (11.0, True)):
        plan = Plan(None, Device("a card", memory), [small, large])
        assert (plan.fits, plan.needed, plan.largest, plan.peak) == (fits, 9.0, large, 12.0)
    assert plan.hours is None and Plan(None, plan.device, [small, small]).hours == 4.0


def test_pairs_that_attend_are_counted_by_hand():
    one = Workload((Row(3, (2, 1)),), 1, "")
    assert one.attended == 6**2  # a dense mask
    long = Workload((Row(300, (200, 100)),), 1, "")
    assert long.attended == 300**2 + 200 * 500 + 100 * 400


def test_steps_follow_from_rows_epochs_and_processes():
    stage = run_of().stages[0]
    assert stage.steps == 126 and stage.rows_seen == 2000  # two epochs of 1,000 rows, 62 whole steps and a short one
    assert dataclasses.replace(stage, processes=4).steps == 32
    assert dataclasses.replace(stage, max_steps=7).steps == 7


def test_phases_add_up_and_grow_with_what_they_hold():
    plan = make_plan(run_of(), Device.of(find_gpu("A100 80GB")))
    assert [phase.name for phase in plan.phases] == [
        "train sft",
        "train rank",
        "evaluate: ranking",
        "evaluate: graded",
    ]
    for phase in plan.phases:
        assert phase.smallest <= phase.allocated < phase.peak
    first, second = plan.phases[:2]
    assert second.parts["frozen adapters, 32-bit and concatenated"] == 6 * plan.run.stages[0].adapter.parameters
    assert "frozen adapters, 32-bit and concatenated" not in first.parts
    assert plan.hours == pytest.approx(sum(phase.hours for phase in plan.phases))
    assert plan.fits and advise(plan) == []


def test_a_base_on_this_machine_is_not_downloaded():
    device = Device.of(find_gpu("A100 80GB"))
    on_hub, here = (
        make_plan(dataclasses.replace(run_of(), downloads=on_hub), device).disk for on_hub in (True, False)
    )
    assert sum(on_hub.values()) - sum(here.values()) == pytest.approx(2 * 6.738e9, rel=1e-3)


def test_a_cpu_has_no_hours_and_an_optimizer_of_8_bits_is_smaller():
    on_cpu = make_plan(run_of(), Device("CPU", 500 * GIB, cuda=False, bf16=False))
    assert on_cpu.hours is None and on_cpu.ram == {}
    small = make_plan(run_of(optimizer="paged_adamw_8bit"), Device("CPU", 500 * GIB, cuda=False, bf16=False))
    saved = on_cpu.phases[0].allocated - small.phases[0].allocated
    assert saved == 6 * on_cpu.run.stages[0].adapter.parameters


def test_a_timed_cpu_has_hours_in_proportion_to_its_rates():
    def hours(tflops, gb_per_second):
        cpu = Gpu("CPU", 0, tflops, gb_per_second, measured=True)
        plan = make_plan(run_of(), Device("CPU", 500 * GIB, cpu, cuda=False, bf16=False))
        return {phase.name: phase.hours for phase in plan.phases}

    slow, fast, wide = hours(0.1, 20), hours(0.2, 20), hours(0.1, 40)
    assert slow["train rank"] == pytest.approx(2 * fast["train rank"]) == pytest.approx(wide["train rank"])
    name = "evaluate: graded"  # generation both reads weights and multiplies
    assert slow[name] > fast[name] and slow[name] > wide[name]
    assert slow[name] == pytest.approx(fast[name] + wide[name] - hours(0.2, 40)[name])


def test_a_decoding_step_waits_for_memory_or_for_launches():
    run = run_of("llama-3.1-8b")

    def milliseconds(gpu, rows):
        return 3.6e6 * decode_hours(run.shape, run.precision, 1, rows, 0.0, find_gpu(gpu))

    launches = 1000 * LAUNCHES_A_LAYER * SECONDS_A_LAUNCH * run.shape.layers
    assert milliseconds("H100 80GB", 32) == pytest.approx(launches)
    assert milliseconds("RTX 4090", 32) > launches
    # Up to 64 and 4 sequences no weight is dequantized.
    assert milliseconds("T4", 65) > 3 * milliseconds("T4", 64)
    assert milliseconds("RTX 4090", 5) > milliseconds("RTX 4090", 4) == pytest.approx(launches)


def test_the_rates_of_this_cpu_are_measured():
    cpu = cpu_speed(torch.float32, seconds=0)
    assert cpu.measured and 1e-6 < cpu.tflops < 1000 and 1e-3 < cpu.gb_per_second < 10_000


def test_a_dense_copy_is_planned_where_half_of_the_free_memory_is_enough():
    name, part = "evaluate: graded", "dense copy of the layers"
    small, large = (
        next(phase for phase in make_plan(run_of(), Device.of(find_gpu(gpu))).phases if phase.name == name)
        for gpu in ("RTX 4090", "A100 80GB")
    )
    assert part not in small.parts and large.parts[part] == 2 * KNOWN["llama-7b"].body
    assert large.needed == small.needed  # it is not needed


def test_activations_are_kept_in_as_many_layers_as_fit():
    device = Device.of(find_gpu("RTX 4080"))
    none, auto, some, full = (
        make_plan(run_of(activation_memory=setting), device).phases[1] for setting in ("none", "auto", 2, "full")
    )
    assert none.peak < some.peak < auto.peak <= device.memory < full.peak
    assert none.flops > some.flops > auto.flops > full.flops
    assert auto.needed == none.needed == none.peak  # activations that `auto` keeps are not needed
    assert none.note == "0/32 layers keep activations" and full.note == "32/32 layers keep activations"


def test_changes_come_cheapest_first_and_only_those_that_help():
    plan = make_plan(run_of(), Device.of(find_gpu("RTX 3060 12GB")))
    changes = advise(plan)
    assert not plan.fits and changes[-1].fits and not any(change.fits for change in changes[:-1])
    peaks = [plan.needed, *(change.peak for change in changes)]
    assert peaks == sorted(peaks, reverse=True)
    assert "max_tokens_per_batch" in changes[0].overrides[0]
    assert changes[-1].peak <= plan.device.memory


def test_what_cannot_fit_says_on_which_gpu_it_would():
    plan = make_plan(run_of("llama-3.1-70b", activation_memory="none", batch_size=1), Device.of(find_gpu("T4")))
    changes = advise(plan)
    assert changes and not changes[-1].fits
    assert smallest_gpu(plan.run) in {gpu.name for gpu in GPUS if gpu.memory_gib > 40}


@pytest.mark.parametrize(
    ("text", "name"),
    [("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx3060", "RTX 3060 12GB"), ("Tesla T4", "T4"), ("t4", "T4"),
     ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("a100", "A100 80GB"),
     ("3060", "RTX 3060 12GB")],
)  # fmt: skip
def test_gpus_go_by_the_names_that_people_and_drivers_use(text, name):
    assert find_gpu(text).name == name


def test_an_unknown_gpu_gets_the_nearest_and_the_list():
    with pytest.raises(UserError) as error:
        find_gpu("RTX 4095")
    assert "unknown GPU 'RTX 4095'" in str(error.value) and "Did you mean 'RTX 4090'?" in str(error.value)
    assert "A100 40GB" in str(error.value) and "Without --gpu: this machine." in str(error.value)


def test_names_of_gpus_are_unique():
    names = [name.lower().replace(" ", "") for gpu in GPUS for name in (gpu.name, *gpu.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "the planner does not know models of type 'gpt2'"),
        ({"model_type": "llama"}, "has no 'hidden_size'"),
        ({"model_type": "qwen3_moe", "num_experts": 64}, "'qwen3_moe': experts stay in 16 bits"),
        ({"model_type": "gemma2"}, "'gemma2': its attention scores are soft-capped"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "'gemma3': with its vision model"),
    ],
)
def test_layouts_that_the_planner_does_not_support_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        ModelShape.from_config(config, "model")


def test_checkpoints_on_disk_by_hand():
    """Adapters in 32 bits with two states of the largest: one of each stage, and two more while a stage trains."""
    sft, rank = run_of().stages
    stages = (
        dataclasses.replace(sft, adapter=Adapter(8, 300, 7)),
        dataclasses.replace(rank, adapter=Adapter(16, 500, 7)),
    )
    disk = make_plan(dataclasses.replace(run_of(), stages=stages), Device.of(find_gpu("L4"))).disk
    assert disk["checkpoints: one of each stage, two more while it trains"] == (2 + 2) * (4 * 800 + 8 * 500)
    assert disk["adapters, separate and combined"] == 2 * 4 * 800
