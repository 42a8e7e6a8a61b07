"""A run folder made by an earlier version resumes, or is rejected with one clear message."""

from __future__ import annotations

import io
import logging

import pytest
import test_pipeline
from rich.console import Console
from test_pipeline import Crash, adapter_bytes, files, recipe, straight  # noqa: F401 - files, straight are fixtures

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft import UserError
from tuna_peft.recipe.dump import diff_recipes, dump_recipe
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.dry_run import describe_recipe
from tuna_peft.run.evaluate import settings_of_run
from tuna_peft.run.folder import RunDirectory, as_in_folder, read_run_recipe
from tuna_peft.run.pipeline import run_recipe
from tuna_peft.run.processes import Processes

# `recipe.yaml` as it was written on 2026-11-28, when recipe/ still held what is in run/ and planning/ now.
OLD = """\
name: tiny
seed: 0
base:
  model: org/base
  dtype: auto
  device: cpu
  trust_remote_code: false
quantization:
  method: nf4
  double_quant: true
  compute_dtype: auto
prompt:
  template: '{instruction} '
lora:
  r: 4
  alpha: 8
  dropout: 0.0
  target_modules: all-linear
  use_rslora: false
stages:
- name: sft
  type: sft
  data:
    path: org/sft
    format: auto
    split: train
    on_bad_row: error
  rounds: 1
  continue_adapter: false
  overflow: error
  lora: {}
  train:
    max_steps: 4
- name: contextual
  type: ranking
  data:
    prompts:
      path: org/ranked
      format: auto
      split: train
      on_bad_row: error
      limit: 12
    sample:
      n: 3
      temperature: 1.0
      top_p: 1.0
      max_new_tokens: 5
      max_similarity: 0.5
      hotter_by: 0.1
      trials: 2
      batch_size: 6
      backend: transformers
    judge:
      quantization: none
      trust_remote_code: false
      function: builtin:pico
      both_orders: false
      include_judge_answer: false
      structured: true
      temperature: 0.0
      max_tokens: 2048
      attempts: 3
      seed: 0
      batch_size: 8
      on_no_answer: error
  rounds: 2
  continue_adapter: true
  overflow: error
  lora:
    r: 2
  train:
    save_steps: 2
evaluation:
  tasks:
    ranking:
      path: org/ranked
      format: auto
      split: train[:8]
      on_bad_row: error
      overflow: error
      margin: 0.1
    graded:
      path: org/ranked
      format: auto
      split: train[:4]
      on_bad_row: error
      grader: builtin:pico
      max_new_tokens: 4
  batch_size: 32
export:
  combine: true
  merge:
    enabled: true
    dtype: bfloat16
    base: dequantised
  divergence_prompts: 4
  gguf: []
"""


def same_recipe() -> Recipe:
    """What a user writes for the recipe above: the keys without a default."""
    sample = {"n": 3, "max_new_tokens": 5, "max_similarity": 0.5, "trials": 2, "batch_size": 6}
    ranked = {"path": "org/ranked"}
    feedback = {"prompts": {**ranked, "limit": 12}, "sample": sample, "judge": {"function": "builtin:pico"}}
    graded = {**ranked, "split": "train[:4]", "grader": "builtin:pico", "max_new_tokens": 4}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "base": {"model": "org/base", "device": "cpu"},
            "prompt": {"template": "{instruction} "},
            "lora": {"r": 4, "alpha": 8},
            "stages": [
                {"name": "sft", "type": "sft", "data": {"path": "org/sft"}, "train": {"max_steps": 4}},
                {"name": "contextual", "type": "ranking", "data": feedback, "rounds": 2, "continue_adapter": True,
                 "lora": {"r": 2}, "train": {"save_steps": 2}},
            ],
            "evaluation": {"tasks": {"ranking": {**ranked, "split": "train[:8]"}, "graded": graded}},
            "export": {"divergence_prompts": 4},
        }
    )  # fmt: skip


@pytest.fixture
def old_folder(tmp_path):
    """A folder in which the first stage is finished."""
    (tmp_path / "recipe.yaml").write_text(OLD)
    done = tmp_path / "stages" / "sft" / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    return tmp_path


def test_the_recipe_in_an_old_folder_is_the_same_recipe(old_folder):
    old, same = read_run_recipe(old_folder), as_in_folder(same_recipe(), old_folder)
    assert diff_recipes(old, same) == [] and old == same
    # What an earlier version began with numbers keeps them, though they are `auto` now.
    assert same_recipe().evaluation.batch_size == "auto" and same.evaluation.batch_size == 32
    assert [recipe.stages[1].data.judge.batch_size for recipe in (same_recipe(), same)] == ["auto", 8]
    with RunDirectory(old_folder, same_recipe()) as run:
        assert run.load("stages/sft/done.json") == {}
    assert (old_folder / "recipe.yaml").read_text() == OLD


def test_an_old_run_resumes_to_the_same_bytes(straight, files, tmp_path, monkeypatch):  # noqa: F811
    crash, real = Crash(7), train_stage_module._trainer
    monkeypatch.setattr(train_stage_module, "_trainer", lambda *args: test_pipeline._with(real(*args), crash))
    with pytest.raises(RuntimeError, match="crash"):
        run_recipe(recipe(files), tmp_path / "run")
    monkeypatch.undo()
    file = tmp_path / "run" / "recipe.yaml"
    text = file.read_text()
    file.write_text(text.replace("base: dequantized", "base: dequantised"))
    assert file.read_text() != text
    report = run_recipe(recipe(files), tmp_path / "run")
    assert report["stages"]["probabilistic"]["resumed_from"] == "checkpoint-2"
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(straight[0])


def test_an_old_run_without_an_evaluation_is_resumed_without_one(old_folder, caplog):
    text = OLD[: OLD.index("evaluation:")] + OLD[OLD.index("export:") :]
    (old_folder / "recipe.yaml").write_text(text)
    values = same_recipe().model_dump(exclude_unset=True, exclude={"evaluation"})
    for _ in range(2):  # the first attempt does not rewrite the file
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "tuna_peft"),
            RunDirectory(old_folder, Recipe.model_validate(values)) as run,
        ):
            assert run.recipe.evaluation is None and run.load("stages/sft/done.json") == {}
        assert [one.message for one in caplog.records if "resumed without" in one.message] == caplog.messages
        assert len(caplog.messages) == 1 and (old_folder / "recipe.yaml").read_text() == text
    other = Processes(on_cpu=True)
    other.main = False
    with RunDirectory(old_folder, Recipe.model_validate(values), other) as run:  # it reads the same data
        assert run.recipe.evaluation is None
    printed = Console(width=200, file=io.StringIO())
    printed.print(describe_recipe(Recipe.model_validate(values), old_folder))
    assert "another recipe" not in printed.file.getvalue() and "evaluation: null" in printed.file.getvalue()
    for given in ("auto", same_recipe().evaluation):
        with pytest.raises(UserError, match=r"evaluation.*: absent -> "):
            RunDirectory(old_folder, Recipe.model_validate({**values, "evaluation": given})).__enter__()


def test_a_folder_of_this_version_tells_null_from_auto(old_folder):
    values = same_recipe().model_dump(exclude_unset=True, exclude={"evaluation"})
    without = Recipe.model_validate({**values, "evaluation": None})
    (old_folder / "recipe.yaml").write_text(dump_recipe(without))
    with RunDirectory(old_folder, without) as run:
        assert run.recipe.evaluation is None
    with pytest.raises(UserError, match="evaluation: absent -> 'auto'"):
        RunDirectory(old_folder, Recipe.model_validate(values)).__enter__()


@pytest.mark.parametrize("text", [OLD.replace("hotter_by", "heat"), "name: ["])
def test_a_recipe_that_this_version_cannot_read_is_rejected_with_the_remedy(old_folder, text):
    (old_folder / "recipe.yaml").write_text(text)
    for attempt in (
        lambda: RunDirectory(old_folder, same_recipe()).__enter__(),
        lambda: settings_of_run(str(old_folder)),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert error.value.where == str(old_folder / "recipe.yaml")
        assert "this version of tuna_peft cannot read the recipe of this run" in error.value.what
        assert ("heat" in error.value.what) == ("heat" in text)
        assert "\n" not in error.value.what and "run.json" in error.value.fix
    assert (old_folder / "recipe.yaml").read_text() == text
