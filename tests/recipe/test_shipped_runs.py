"""Every shipped recipe runs, on pico-LLaMA and with its steps cut."""

import pytest

from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.pipeline import run_recipe
from tuna_peft.recipe.shipped import shipped_recipes

# What each recipe needs to run without a network, beyond fewer steps.
SWAPPED = {
    "quickstart": [
        "evaluation.tasks.ranking.limit=8",
        "evaluation.tasks.graded.limit=8",
        "stages.contextual.data.prompts.limit=12",
    ],
    "two-stage": [
        "base.model=builtin:pico-llama",
        "stages.probabilistic.data.path=builtin:pico-llama/teacher.json",
        "stages.contextual.data.path=builtin:pico-llama/judge.json",
        "evaluation.tasks.ranking={path: builtin:pico-llama/teacher.json, limit: 8}",
        "stages.probabilistic.train.max_length=256",
        "stages.contextual.train.max_length=256",
    ],
}


def test_none_is_forgotten():
    assert set(SWAPPED) == set(shipped_recipes())


@pytest.mark.parametrize("name", SWAPPED)
def test_runs(name, tmp_path):
    stages = [stage.name for stage in load_recipe(name, check=False).stages]
    cut = [
        f"stages.{stage}.train.{key}" for stage in stages for key in ("max_steps=2", "gradient_accumulation_steps=1")
    ]
    report = run_recipe(load_recipe(name, [*SWAPPED[name], *cut]), tmp_path / "run")
    assert list(report["evaluation"]) == ["base", *stages]
    assert all(report["stages"][stage]["steps"] == 2 for stage in stages)
    assert report["exports"]["combined"]["divergence"]["kl_mean"] <= 1e-10
