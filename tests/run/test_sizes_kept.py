"""Sizes that are `auto` become numbers once, in the run's folder, and a resumed run keeps them."""

from __future__ import annotations

import pytest

from tuna_peft.recipe.document import read_document
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.folder import SIZES, RunDirectory

TOKENS, SAMPLES, EVALUATION = (  # the last was among them before each task had its own
    "stages.rank.train.max_tokens_per_batch",
    "stages.rank.data.sample.batch_size",
    "evaluation.batch_size",
)
SIZES_HERE = {TOKENS: 2048, SAMPLES: 64, EVALUATION: 16}


@pytest.fixture
def recipe():
    stage = {
        "name": "rank", "type": "ranking", "train": {"max_tokens_per_batch": "auto"},
        "data": {
            "prompts": {"path": "p.jsonl"}, "judge": {"function": "builtin:pico"}, "sample": {"batch_size": "auto"},
        },
    }  # fmt: skip
    evaluation = {"tasks": {"ranking": {"path": "r.jsonl"}}, "batch_size": "auto"}
    base = {"model": "builtin:pico-llama", "device": "cpu"}
    return Recipe.model_validate({"name": "r", "base": base, "stages": [stage], "evaluation": evaluation})


def numbers(run):
    [stage] = resolve_stages(run.recipe)
    return {
        TOKENS: stage.train["max_tokens_per_batch"],
        SAMPLES: stage.feedback.sample.responses_at_once,
        EVALUATION: run.recipe.named_evaluation.batch_size,
    }


def test_they_are_kept_on_a_device_with_other_sizes(recipe, tmp_path, caplog):
    with caplog.at_level("INFO", "tuna_peft"), RunDirectory(tmp_path / "run", recipe) as run:
        run.fix_sizes()  # before the plan: nothing is known
        assert not (tmp_path / "run" / SIZES).exists()
        run.fix_sizes(SIZES_HERE)
        assert numbers(run) == SIZES_HERE
        run.save("evaluation/base/x.json", {})
    assert "evaluation.batch_size=16" in caplog.text
    with RunDirectory(tmp_path / "run", recipe) as run:
        run.fix_sizes()
        assert numbers(run) == SIZES_HERE
        run.fix_sizes(dict.fromkeys(SIZES_HERE, 1))
        assert numbers(run) == SIZES_HERE
    written = read_document(tmp_path / "run" / "recipe.yaml").data
    assert written["evaluation"]["batch_size"] == "auto"  # so that the same recipe resumes the run
    assert recipe.evaluation.batch_size == "auto"


def test_a_run_that_stopped_at_its_inputs_begins_anew(recipe, tmp_path):
    for size in (16, 8):
        with RunDirectory(tmp_path / "run", recipe) as run:
            run.fix_sizes()
            run.fix_sizes({EVALUATION: size})
            assert run.recipe.named_evaluation.batch_size == size  # nothing was computed with the other


def test_without_a_plan_there_are_numbers_too(recipe, tmp_path):
    with RunDirectory(tmp_path / "run", recipe) as run:
        run.fix_sizes(None)
        assert numbers(run) == {TOKENS: "auto", SAMPLES: 32, EVALUATION: "auto"}  # replaced where it is used
