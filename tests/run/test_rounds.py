"""Rounds that continue one adapter: where each starts, what the stack has, and that crashes change nothing."""

from __future__ import annotations

import json

import pytest
from test_pipeline import Crash, _with, files, recipe  # noqa: F401 - files is a fixture
from test_rank_samples import SAMPLE, made, on_policy
from typer.testing import CliRunner

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft import AdapterStack
from tuna_peft.cli.app import app
from tuna_peft.data.texts import prompt_ids
from tuna_peft.models.generation.generate import stream_responses
from tuna_peft.models.stack.adapters import adapter_names, fingerprint, load_adapter
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.run import pipeline, rank_samples
from tuna_peft.run.evaluate import evaluate_target
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.pipeline import run_recipe

STAGES = ["probabilistic", "contextual-1", "contextual-2"]


def continued(files):  # noqa: F811
    changes = {**on_policy(files, sample=SAMPLE), "rounds": 2, "continue_adapter": True}
    one = made(files, changes)
    for stage in one.stages:
        stage.train["save_steps"] = 1
    return one.model_copy(update={"evaluation": recipe(files).evaluation})


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):  # noqa: F811
    """An uninterrupted run: its folder, its report, and the stack as each stage starts to train."""
    folder, starts, real = tmp_path_factory.mktemp("runs") / "run", [], train_stage_module._trainer

    def spy(model, *args):
        names = adapter_names(model)
        starts.append((names, fingerprint(model, names[-1])))
        return real(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage_module, "_trainer", spy)
        report = run_recipe(continued(files), folder)
    return folder, report, starts


def test_each_round_starts_where_the_one_before_ended_and_takes_its_place(straight):
    folder, report, starts = straight
    assert list(report["stages"]) == STAGES and list(report["evaluation"]) == ["base", *STAGES]
    assert [names for names, _ in starts] == [["probabilistic"], ["probabilistic", STAGES[1]], [STAGES[0], STAGES[2]]]
    loaded = AdapterStack.from_pretrained(folder, device="cpu")  # verifies hashes
    assert loaded.names == ["probabilistic", "contextual-2"]
    load_adapter(loaded.model, "first", folder / "stack/contextual-1")
    assert starts[1][1] != starts[2][1] == fingerprint(loaded.model, "first")
    assert fingerprint(loaded.model, "contextual-2") != starts[2][1]


def test_a_round_samples_from_the_one_before(straight):
    folder = straight[0]
    below = AdapterStack.from_pretrained(folder, upto="probabilistic", device="cpu")
    model = load_adapter(below.model, "contextual-1", folder / "stack/contextual-1")
    stage = folder / "stages/contextual-2"
    ids = prompt_ids(json.loads((stage / "samples.jsonl").read_text().splitlines()[0])["prompt"], below.tokenizer)
    [drawn] = stream_responses(
        model, below.tokenizer, [ids], n=3, temperature=1.0, max_new_tokens=5, seed="0/contextual-2/0"
    )
    journal = (stage / "samples.journal.jsonl").read_text().splitlines()
    assert drawn.texts in [json.loads(line)["value"]["texts"] for line in journal[1:]]


def test_what_the_last_round_measures_is_the_stack_that_a_user_loads(straight, files, tmp_path):  # noqa: F811
    folder, report, _ = straight
    again = evaluate_target(str(folder), continued(files).evaluation, tmp_path, stages=["contextual-2"])
    for task, result in again["contextual-2"].items():
        assert result.summary()["metrics"] == report["evaluation"]["contextual-2"][task]["metrics"]


def test_crashes_in_the_second_round_change_nothing(straight, files, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "run"

    def crashes():
        with pytest.raises(RuntimeError, match="crash"):
            run_recipe(continued(files), folder)
        monkeypatch.undo()

    real_sample, real_trainer, real_save = rank_samples._sample, train_stage_module._trainer, RunDirectory.save

    def sample(run, model, base, stage, *args):
        if stage.name == "contextual-2":
            raise RuntimeError("crash")
        return real_sample(run, model, base, stage, *args)

    def save(self, name, value):
        if name == "stages/contextual-2/done.json":
            raise RuntimeError("crash")
        real_save(self, name, value)

    monkeypatch.setattr(rank_samples, "_sample", sample)
    crashes()  # between the rounds
    monkeypatch.setattr(train_stage_module, "_trainer", lambda *args: _with(real_trainer(*args), Crash(2)))
    crashes()  # after the first of two steps was saved
    monkeypatch.setattr(RunDirectory, "save", save)
    crashes()  # when stack.json names the second round already, and nothing says that it is done
    report = run_recipe(continued(files), folder)
    assert report["stages"]["contextual-2"]["resumed_from"]
    stack = [f"stack/{name}/adapter_model.safetensors" for name in STAGES]
    rows = [f"stages/contextual-2/{name}.jsonl" for name in ("samples", "ranked")]
    for file in ("stack/stack.json", *stack, *rows):
        assert (folder / file).read_bytes() == (straight[0] / file).read_bytes(), file


def test_a_finished_run_is_loaded_round_by_round(straight, files, monkeypatch):  # noqa: F811
    folder, report, _ = straight
    stacks, real = {}, pipeline._evaluate

    def spy(run, model, base, inputs, stage):
        stacks[stage] = adapter_names(model)
        real(run, model, base, inputs, stage)

    monkeypatch.setattr(pipeline, "_evaluate", spy)
    monkeypatch.setattr(pipeline, "train_stage", lambda *args: pytest.fail("trained again"))
    assert run_recipe(continued(files), folder) == report
    assert [*stacks] == ["base", *STAGES]
    assert stacks["contextual-1"] == ["probabilistic", "contextual-1"]
    assert stacks["contextual-2"] == ["probabilistic", "contextual-2"]


def test_dry_run_and_plan(files, tmp_path):  # noqa: F811
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(continued(files)))
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run"])
    assert shown.exit_code == 0, shown.stderr
    assert "on the frozen probabilistic, starting from contextual-1, which it replaces" in shown.stdout
    assert "samples 3 responses per prompt from contextual-1" in shown.stdout
    planned = CliRunner().invoke(app, ["plan", str(file), "--gpu", "t4"])
    assert planned.exit_code == 0 and "train contextual-2" in planned.stdout, planned.output
