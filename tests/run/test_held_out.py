"""`evaluation: auto`: which prompts are held back, and that no stage trains on them."""

from __future__ import annotations

import json
import logging

import pytest
from test_pipeline import TRAIN, files  # noqa: F401 - a fixture
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.data import load
from tuna_peft.errors import UserError
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.evaluation_schema import EvaluationSettings, held_out_size
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.evaluate import evaluate_target, holds_prompts_back, settings_of_run
from tuna_peft.run.folder import read_run_recipe
from tuna_peft.run.inputs import read_inputs
from tuna_peft.run.pipeline import run_recipe


@pytest.mark.parametrize(
    ("prompts", "needed", "expected"),
    [
        (1000, 8, 50),  # 5 %
        (400, 8, 20),
        (399, 8, 20),  # not 19.95
        (200, 8, 20),
        (199, 8, 19),  # 10 % of fewer than 200
        (30, 8, 3),
        (9, 1, 0),
        (30, 29, 1),  # training needs 29
        (30, 30, 0),
        (30, 64, 0),
    ],
)
def test_how_many_are_held_back(prompts, needed, expected):
    assert held_out_size(prompts, needed) == expected


def write_rows(path, numbers):
    rows = [{"id": f"{path.stem} {i}", "prompt": f"w{i} w3 ", "completions": ["w5 w6", "w7"], "scores": [1.0, 0.0]}
            for i in numbers]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.fixture
def recipe(files, tmp_path):  # noqa: F811
    """Three stages on overlapping prompts; changes are keys of the recipe."""
    first = write_rows(tmp_path / "first.jsonl", range(40, 80))
    second = write_rows(tmp_path / "second.jsonl", range(60, 90))

    def make(**changes):
        values = {
            "name": "auto",
            "base": {"model": str(files / "base"), "device": "cpu"},
            "prompt": {"template": "none"},
            "lora": {"r": 2},
            "stages": [
                {"name": "sft", "type": "sft", "data": first, "train": TRAIN},
                {"name": "one", "type": "ranking", "data": first, "train": TRAIN},
                {"name": "two", "type": "ranking", "data": second, "train": {**TRAIN, "margin": 0.2}},
            ],
            "export": {"combine": False, "merge": {"enabled": False}},
        }  # fmt: skip
        return Recipe.model_validate({**values, **changes})

    return make


def inputs_of(recipe):
    tokenizer = AutoTokenizer.from_pretrained(recipe.base.model)
    return read_inputs(recipe, tokenizer, AutoConfig.from_pretrained(recipe.base.model)), tokenizer


def texts(rows, tokenizer):
    """The prompts of encoded rows of either kind."""
    if "prompt_ids" in rows.column_names:
        return {tokenizer.decode(ids) for ids in rows["prompt_ids"]}
    return {
        tokenizer.decode([i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if not mask])
        for row in rows
    }


def measured(inputs):
    """The questions of the task `answers`: with fewer than 20 prompts, all that are held back."""
    [task] = [task for task in inputs.tasks if task.name == "answers"]
    return {question.prompt for question in task.run.keywords["questions"]}


def test_no_stage_trains_on_a_prompt_that_is_held_back(recipe, caplog):
    with caplog.at_level(logging.INFO, "tuna_peft"):
        inputs, tokenizer = inputs_of(recipe())
    held = {" ".join(text.split()) for text in measured(inputs)}
    # 4 of 40 and 3 of 30; a prompt that both stages have counts once.
    counts = inputs.counts["evaluation"]["held_out"]
    assert 4 <= len(held) == sum(counts.values()) <= 7 and counts["one"] >= 4
    everything = {f"w{i} w3" for i in range(40, 90)}
    trained = [{" ".join(text.split()) for text in texts(inputs.stages[name], tokenizer)} for name in inputs.stages]
    assert held < everything and not any(held & of_stage for of_stage in trained)
    assert trained[0] == trained[1] == {f"w{i} w3" for i in range(40, 80)} - held
    assert trained[2] == {f"w{i} w3" for i in range(60, 90)} - held
    assert f"stage one: {counts['one']} of 40 prompts are held back" in caplog.text and "seed 0" in caplog.text


def test_the_choice_depends_on_seed_and_prompts_but_not_on_their_order(recipe, tmp_path):
    before = measured(inputs_of(recipe())[0])
    assert measured(inputs_of(recipe())[0]) == before
    assert measured(inputs_of(recipe(seed=1))[0]) != before
    write_rows(tmp_path / "first.jsonl", reversed(range(40, 80)))
    assert measured(inputs_of(recipe())[0]) == before


def test_training_keeps_what_a_step_needs(recipe, caplog):
    wide = {**TRAIN, "per_device_train_batch_size": 20, "gradient_accumulation_steps": 2}
    stages = recipe().model_dump(mode="json", exclude_none=True)["stages"]
    with caplog.at_level(logging.INFO, "tuna_peft"):
        inputs, _ = inputs_of(recipe(stages=[{**stage, "train": wide} for stage in stages]))
    assert [len(rows) for rows in inputs.stages.values()] == [40, 40, 30] and not inputs.tasks
    assert "too few prompts to hold some back" in caplog.text


def test_held_back_examples_that_are_all_too_long_are_skipped_if_the_recipe_says_so(recipe, tmp_path, caplog):
    stages = recipe().model_dump(mode="json", exclude_none=True)["stages"]
    one = {**stages[1], "train": {**TRAIN, "max_length": 12}}
    held = measured(inputs_of(recipe(stages=[one]))[0])
    rows = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    long = [row | {"completions": ["w5 " * 20, "w7 " * 20]} if row["prompt"] in held else row for row in rows]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    inputs, _ = inputs_of(recipe(stages=[{**one, "overflow": "skip"}]))
    assert not inputs.tasks and len(inputs.stages["one"]) == 36
    assert "nothing can be measured on its held-back prompts" in caplog.text
    with pytest.raises(UserError, match="too long"):
        inputs_of(recipe(stages=[one]))


def test_null_and_named_tasks_train_on_everything(recipe, tmp_path):
    named = {"tasks": {"ranking": {"path": str(tmp_path / "second.jsonl")}}}
    for evaluation, tasks in ((None, []), (named, ["ranking"])):
        inputs, _ = inputs_of(recipe(evaluation=evaluation))
        assert [len(rows) for rows in inputs.stages.values()] == [40, 40, 30]
        assert [task.name for task in inputs.tasks] == tasks


def test_a_run_of_three_steps_says_whether_it_learned(recipe, tmp_path):
    short = {**TRAIN, "max_steps": 3, "logging_steps": 500, "save_strategy": "no"}
    one = recipe().model_dump(mode="json", exclude_none=True)["stages"][1]
    wanted = recipe(stages=[{**one, "train": short}])
    report = run_recipe(wanted, tmp_path / "run")
    assert list(report["evaluation"]) == ["base", "one"]
    for tasks in report["evaluation"].values():
        metrics = tasks["ranking"]["metrics"]
        assert tasks["ranking"]["prompts"] == metrics["pair_accuracy"]["count"] == 4
        assert metrics["margin"]["low"] <= metrics["margin"]["value"] <= metrics["margin"]["high"]
        assert tasks["answers"]["prompts"] == 4
    losses = report["curves"]["one"]["loss"]["loss"]
    assert [step for step, _ in losses] == [1, 3]
    assert "4 prompts held back from training" in (tmp_path / "run" / "report.html").read_text()
    # A second call, and `evaluate`, find the same prompts and measure nothing again.
    assert run_recipe(wanted, tmp_path / "run") == report
    files_before = {file: file.read_bytes() for file in (tmp_path / "run" / "evaluation").rglob("*.json")}
    settings = type(recipe(evaluation={}).evaluation)()
    results = evaluate_target(str(tmp_path / "run"), settings, tmp_path / "run")
    assert list(results) == ["base", "one"] and list(results["one"]) == ["ranking", "answers"]
    assert {file: file.read_bytes() for file in (tmp_path / "run" / "evaluation").rglob("*.json")} == files_before
    assert settings_of_run(str(tmp_path / "run")) == {} and holds_prompts_back(str(tmp_path / "run"))
    compared = CliRunner().invoke(app, ["compare", f"{tmp_path / 'run'}@base", str(tmp_path / "run")])
    assert compared.exit_code == 0 and "ranking accuracy" in compared.stdout and "answer length" not in compared.stdout


def test_auto_is_the_default_and_null_survives_in_the_folder(recipe, tmp_path):
    assert recipe().evaluation == "auto" and recipe(evaluation="auto").named_evaluation is None
    for evaluation in ("auto", None):
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(evaluation=evaluation)))
        assert read_run_recipe(tmp_path).evaluation == load_recipe(tmp_path / "recipe.yaml").evaluation == evaluation
    # An earlier version wrote no key for null: its folder must not be read as `auto`.
    text = dump_recipe(recipe(evaluation=None)).replace("evaluation: null\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    assert "evaluation" not in text and read_run_recipe(tmp_path).evaluation is None


def test_another_word_is_a_mistake_that_names_the_right_one(recipe, tmp_path):
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe()).replace("evaluation: auto", "evaluation: atuo"))
    with pytest.raises(UserError, match=r"expected 'auto', found 'atuo'") as error:
        load_recipe(tmp_path / "r.yaml")
    assert error.value.where.endswith("evaluation")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe()).replace("evaluation: auto", "evaluation: {task: {}}"))
    with pytest.raises(UserError, match="unknown key") as error:
        load_recipe(tmp_path / "r.yaml")
    assert error.value.where.endswith("evaluation.task") and "tasks" in error.value.fix


@pytest.fixture
def judged(recipe, tmp_path):
    """A stage that samples and grades its own responses on top of one with ranked data; other prompts, or the same."""

    def make(numbers):
        data = {"prompts": write_rows(tmp_path / "asked.jsonl", numbers),
                "sample": {"n": 3, "max_new_tokens": 4, "batch_size": 8, "max_similarity": 1.1},
                "judge": {"function": "test_held_out:grade"}}  # fmt: skip
        stages = recipe().model_dump(mode="json", exclude_none=True)["stages"]
        own = {"name": "own", "type": "ranking", "data": data, "train": TRAIN}
        return recipe(stages=[stages[1], own])

    return make


def grade(record, response):
    """A judge for the tests."""
    return float(sum(map(ord, response)))


def test_a_stage_that_ranks_its_own_samples_holds_prompts_back_and_is_measured_on_them(judged, tmp_path):
    wanted = judged(range(10, 40))
    report = run_recipe(wanted, tmp_path / "run")
    tasks = {stage: set(results) for stage, results in report["evaluation"].items()}
    assert tasks == {stage: {"ranking", "answers", "ranking-own"} for stage in ("base", "one", "own")}
    held = report["data"]["evaluation"]["held_out"]
    assert held == {"one": 4, "own": 3}
    ranked = [json.loads(line) for line in (tmp_path / "run/stages/own/ranked.jsonl").read_text().splitlines()]
    assert report["data"]["own"]["judge"]["rows"] == 30 and len(ranked) > 27  # those held back are ranked, too
    measured_on = {prompt["id"] for prompt in result_file(tmp_path / "run", "own", "ranking-own")["prompts"]}
    trained = report["data"]["own"]["training"]["tokens"]["rows"]
    assert 1 <= len(measured_on) <= 3 and trained + len(measured_on) == len(ranked)
    # The base and the stage before were measured on them with their own adapters only.
    accuracy = {stage: result_file(tmp_path / "run", stage, "ranking-own")["prompts"][0]["details"]["v"]
                for stage in tasks}  # fmt: skip
    assert len({tuple(v) for v in accuracy.values()}) == 3
    # A second call and `evaluate` measure nothing again.
    files_before = {file: file.read_bytes() for file in (tmp_path / "run/evaluation").rglob("*.json")}
    assert run_recipe(wanted, tmp_path / "run") == report
    results = evaluate_target(str(tmp_path / "run"), EvaluationSettings(), tmp_path / "run")
    assert {stage: set(of_stage) for stage, of_stage in results.items()} == tasks
    assert {file: file.read_bytes() for file in (tmp_path / "run/evaluation").rglob("*.json")} == files_before


def test_prompts_that_another_stage_measures_are_not_sampled(judged):
    inputs, _ = inputs_of(judged(range(40, 80)))
    assert list(inputs.held_out.records) == ["one"] and len(inputs.prompts["own"]) == 36


def test_a_run_that_only_ranks_its_own_samples_is_measured(recipe, judged, tmp_path):
    stages = judged(range(40, 80)).model_dump(mode="json", exclude_none=True)["stages"]
    report = run_recipe(recipe(stages=stages[1:]), tmp_path / "run")
    assert {stage: sorted(results) for stage, results in report["evaluation"].items()} == {
        "base": ["answers", "ranking"], "own": ["answers", "ranking"],
    }  # fmt: skip
    assert report["changes"]["own"]["ranking"]["count"] >= 1


def test_supervised_fine_tuning_on_the_best_sample_is_measured_on_lists(recipe, judged, tmp_path):
    stages = judged(range(40, 80)).model_dump(mode="json", exclude_none=True)["stages"]
    own = {**stages[1], "type": "sft", "train": {**TRAIN, "max_steps": 1}}
    report = run_recipe(recipe(stages=[own]), tmp_path / "run")
    assert set(report["evaluation"]["own"]) == {"ranking", "answers"}
    held = report["data"]["evaluation"]["held_out"]["own"]
    [first, *_] = result_file(tmp_path / "run", "own", "ranking")["prompts"]
    assert held >= 1 and len(first["details"]["v"]) > 1
    assert report["data"]["own"]["training"]["tokens"]["rows"] < report["data"]["own"]["judge"]["ranked"]


def test_a_margin_that_training_chooses_is_measured_by_the_default(recipe, tmp_path):
    stages = recipe().model_dump(mode="json", exclude_none=True)["stages"][1:2]
    stages[0]["train"]["margin"] = "auto"
    report = run_recipe(recipe(stages=stages), tmp_path / "run")
    assert report["stages"]["one"]["auto_margin"] > 0
    assert result_file(tmp_path / "run", "one", "ranking")["settings"]["margin"] == 0.1


def test_ranked_data_is_read_three_times(recipe, monkeypatch):
    """To choose the prompts that are held back, to take them, and for training: it may be too large to be kept."""
    read, real = [], load.read_records

    def counted(source):
        read.append(source.path)
        return real(source)

    monkeypatch.setattr(load, "read_records", counted)
    inputs_of(recipe(stages=recipe().model_dump(mode="json", exclude_none=True)["stages"][1:]))
    assert sorted(read) == sorted(3 * list(set(read))) and len(set(read)) == 2


def result_file(run, stage, task):
    return json.loads((run / "evaluation" / stage / f"{task}.json").read_text())
