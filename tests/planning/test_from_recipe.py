"""Plans of recipes: training data that the run makes, local teachers and judges, benchmarks that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuna_peft.errors import UserError
from tuna_peft.limits import GIB
from tuna_peft.planning.from_recipe import plan_recipe
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.shapes import UnplannedModel
from tuna_peft.planning.spec import Device
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run import preflight as preflight_module
from tuna_peft.run.inputs import read_inputs
from tuna_peft.run.preflight import preflight

T4 = Device.of(find_gpu("T4"))
DATA = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = {"path": "builtin:pico-llama/prompts.jsonl", "limit": 20}
SAMPLE = {"n": 3, "max_new_tokens": 40, "max_similarity": 2}
PICO = "builtin:pico-llama"


def contextual(**data):
    return f"stages.contextual.data={json.dumps({'prompts': PROMPTS, **data})}"


def planned(*overrides, recipe="quickstart"):
    [plan], _ = plan_recipe(load_recipe(recipe, overrides, check=False), [T4])
    return plan, {phase.name: phase for phase in plan.phases}, {stage.name: stage for stage in plan.run.stages}


def test_sampled_rows_are_as_long_as_they_may_become():
    plan, phases, stages = planned(contextual(sample=SAMPLE, judge={"model": PICO, "include_judge_answer": True}))
    stage = stages["contextual"]
    assert stage.prompt_workload.total == 20 and {row.responses for row in stage.prompt_workload.rows} == {
        (40, 40, 40)
    }
    assert {row.responses for row in stage.workload.rows} == {(40,) * 4}  # and the judge's own
    assert phases["sample contextual"].note == ""  # never drawn again
    longest = max(row.prompt for row in stage.prompt_workload.rows)
    asked = max(row.prompt for row in stage.judge.questions.rows)
    assert longest + 3 * 40 + 400 < asked < longest + 3 * 40 + 1200
    assert not stage.judge.greedy and PICO + ", 16-bit" in phases["judge contextual"].parts


def test_rows_that_a_teacher_scores_are_those_of_the_file():
    prompts = {"path": "builtin:pico-llama/teacher.json", "limit": 20}
    data = {"prompts": prompts, "score": {"model": PICO, "quantization": "nf4"}}
    _, phases, stages = planned(f"stages.contextual.data={json.dumps(data)}")
    rows = stages["contextual"].prompt_workload.rows
    assert len(rows) == 20 and all(len(row.responses) > 1 and min(row.responses) > 1 for row in rows)
    assert PICO + ", nf4" in phases["score contextual"].parts and "sample contextual" not in phases


def test_no_row_is_longer_than_training_takes():
    limits = ["stages.contextual.train.max_length=64", "stages.contextual.overflow=cut"]
    *_, stages = planned(
        contextual(sample={**SAMPLE, "max_new_tokens": 200}, judge={"function": "builtin:pico"}), *limits
    )
    assert max(row.longest for row in stages["contextual"].workload.rows) <= 64
    assert max(row.longest for row in stages["contextual"].prompt_workload.rows) > 200


def test_rounds_are_sampled_judged_and_trained_one_after_the_other():
    _, phases, stages = planned(contextual(sample=SAMPLE, judge={"model": PICO}), "stages.contextual.rounds=2")
    names = [name for name in phases if "contextual" in name]
    kinds = ("sample", "judge", "train")
    assert names == [f"{kind} contextual-{number}" for number in (1, 2) for kind in kinds]
    first, second = (phases[f"sample contextual-{number}"].parts for number in (1, 2))
    assert second["frozen adapters, 32-bit and concatenated"] > first["frozen adapters, 32-bit and concatenated"]
    assert stages["contextual-2"].key == "stages.contextual"


def test_servers_and_programs_take_nothing_and_vllm_is_named():
    server = {"server": {"base_url": "http://localhost:1/v1", "model": "m"}}
    plan, phases, _ = planned(contextual(sample={**SAMPLE, "backend": "vllm"}, judge=server))
    assert [name for name in phases if "contextual" in name] == ["train contextual"]
    assert plan.run.unplanned == (
        "sampling of contextual: vLLM loads a second copy of the model and uses all free memory",
    )
    sample = {**SAMPLE, "server": {"base_url": "http://localhost:1/v1"}}
    plan, phases, _ = planned(contextual(sample=sample, judge=server))
    assert [name for name in phases if "contextual" in name] == ["train contextual"]
    assert plan.run.unplanned == (
        "sampling of contextual: the server's memory, and the model exported for it on disk",
    )


def test_benchmarks_that_are_not_here_count_in_their_published_sizes():
    plan, phases, _ = planned(recipe="paper/tuna-llama-7b")
    tasks = plan.run.evaluation
    assert {name: task.workload.total for name, task in tasks.items()} == {
        "ranking": 200, "superni-0shot": 11_900, "superni-2shot": 11_900, "lmentry": 110_700,
    }  # fmt: skip
    assert all("assumed" in task.workload.source for task in tasks.values())
    assert max(row.prompt for row in tasks["superni-2shot"].workload.rows) == 2048 - 128  # the rest has no room
    assert phases["evaluate: lmentry"].note == "4 times" and phases["evaluate: lmentry"].tokens > 4 * 110_700 * 50


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_benchmarks_that_are_here_are_counted():
    paths = [
        f"evaluation.tasks.superni={{path: {DATA}/superni/test_instances.jsonl, shots: [0], per_task: 5}}",
        f"evaluation.tasks.lmentry={{path: {DATA}/lmentry, per_template: 1}}",
        f"evaluation.tasks.vicuna={{path: {DATA}/vicuna80/question.jsonl, judge: {{model: {PICO}}}}}",
    ]
    plan, phases, _ = planned(*paths, "evaluation.tasks.lm_eval={tasks: [arc_easy]}")
    tasks = plan.run.evaluation
    assert tasks["superni-0shot"].workload.total == 75 and tasks["lmentry"].workload.total == 41 * 3
    assert tasks["vicuna"].workload.total == 80 and tasks["vicuna"].judge.questions.total == 160
    assert "judge vicuna" in phases and "lm_eval" in plan.run.unplanned[0]


def test_a_teacher_of_an_unknown_layout_is_refused_by_plan_and_no_reason_to_stop_a_run(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    recipe = load_recipe("quickstart", [contextual(sample=SAMPLE, score={"model": str(tmp_path)})], check=False)
    with pytest.raises(UnplannedModel, match=r"stages.contextual.data.score.model \(.*\): the planner does not know"):
        plan_recipe(recipe, [T4])
    config, tokenizer, inputs = read(recipe)
    with caplog.at_level("INFO"):
        assert preflight(recipe, inputs, config, tokenizer=tokenizer) is None
    assert "no memory plan: the planner does not know models of type 'gpt2'" in caplog.text


def test_a_teacher_that_does_not_fit_beside_the_base_is_refused_before_training(monkeypatch):
    recipe = load_recipe("quickstart", [contextual(sample=SAMPLE, score={"model": "meta-llama/Llama-2-13b-hf"})],
                         check=False)  # fmt: skip
    config, tokenizer, inputs = read(recipe)
    monkeypatch.setattr(preflight_module, "this_device", lambda setting: Device("card", 8 * GIB))
    with pytest.raises(UserError, match="this cannot fit: score contextual needs 24.* GiB at least") as error:
        preflight(recipe, inputs, config, tokenizer=tokenizer)
    assert "To make it fit: " in error.value.fix
    assert "stages.contextual.data.score.quantization=nf4" in error.value.fix


def test_a_run_knows_its_prompts_in_tokens():
    recipe = load_recipe("quickstart", [contextual(sample=SAMPLE, judge={"function": "builtin:pico"})], check=False)
    config, tokenizer, inputs = read(recipe)
    plan = preflight(recipe, inputs, config, tokenizer=tokenizer)
    [stage] = [stage for stage in plan.run.stages if stage.name == "contextual"]
    *_, stages = planned(contextual(sample=SAMPLE, judge={"function": "builtin:pico"}))
    assert stage.prompt_workload == stages["contextual"].prompt_workload


def read(recipe):
    from tuna_peft.models.base.load import load_config_and_tokenizer

    config, tokenizer = load_config_and_tokenizer(recipe.base.model)
    return config, tokenizer, read_inputs(recipe, tokenizer, config)


def test_a_teacher_that_has_done_its_work_may_be_gone(tmp_path):
    recipe = load_recipe(
        "quickstart", [contextual(sample=SAMPLE, score={"model": str(tmp_path / "gone")})], check=False
    )
    config, tokenizer, inputs = read(recipe)
    with pytest.raises(UserError, match=r"stages.contextual.data.score.model \(.*gone\): "):
        preflight(recipe, inputs, config, tokenizer=tokenizer)
    plan = preflight(recipe, inputs, config, tokenizer=tokenizer, ranked=["contextual"])
    assert [phase.name for phase in plan.phases if "contextual" in phase.name] == ["train contextual"]


def test_the_prompts_that_auto_holds_back_are_planned():
    ranked = {"path": "builtin:pico-llama/teacher.json", "limit": 400}
    stages = [
        {"name": name, "type": "ranking", "data": {**ranked, **more}, "train": {"per_device_train_batch_size": 4}}
        for name, more in (("one", {}), ("again", {}), ("other", {"limit": 100}))
    ]
    plan, phases, _ = planned(f"stages={json.dumps(stages)}", "evaluation=auto")
    # 5 % of 400 once, and 10 % of 100.
    assert plan.run.evaluation["ranking"].workload.total == 30
    assert plan.run.evaluation["answers"].workload.total == 20
    assert phases["evaluate: ranking"].tokens > 0 and phases["evaluate: answers"].note == "4 times"
    assert "evaluate: ranking" not in planned(f"stages={json.dumps(stages)}", "evaluation=null")[1]


def test_auto_plans_the_batches_that_fit(monkeypatch):
    ranked = {"path": "builtin:pico-llama/teacher.json", "limit": 400}
    stage = {"name": "one", "type": "ranking", "data": ranked, "train": {"per_device_train_batch_size": 1}}
    overrides = [f"stages={json.dumps([stage])}", "evaluation=auto"]
    plan, phases, _ = planned(*overrides)
    peak = max(phase.peak for name, phase in phases.items() if name.startswith("evaluate"))
    small = Device("small", peak - 1, bf16=False)
    [tight], _ = plan_recipe(load_recipe("quickstart", overrides, check=False), [small])
    sizes = [sum(task.batch_size for task in one.run.evaluation.values()) for one in (tight, plan)]
    assert sizes[0] < sizes[1]
    assert max(phase.peak for phase in tight.phases if phase.name.startswith("evaluate")) < peak


def test_responses_that_may_be_similar_are_sampled_once():
    key = "stages.contextual.data.sample"
    for similarity, note in ((0.8, "up to 3 attempts"), (1.1, "")):
        _, phases, _ = planned(f"{key}.trials=3", f"{key}.max_similarity={similarity}")
        assert phases["sample contextual"].note == note
