"""`tuna-peft run --dry-run`: the description of what a run would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from tuna_peft.errors import UserError
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run.dry_run import describe_recipe


def described(recipe, output: Path) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(describe_recipe(recipe, output), soft_wrap=True)
    return capture.get()


def test_the_resolved_recipe_and_what_each_stage_would_do(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    text = described(recipe, tmp_path / "run")
    assert dump_recipe(recipe).splitlines()[0] in text
    assert "builtin:pico-llama, nf4, double quantization" in text
    assert "stage sft (sft): trains\n  LoRA r=4 alpha=32 (all-linear) on the base\n" in text
    assert "LoRA r=16 alpha=32 (all-linear) on the frozen sft" in text
    assert "ranked.jsonl: 3 rows" in text and "ranked.jsonl: 2 rows" in text  # the second stage has a limit
    assert "about 4 optimizer steps" in text  # 3 rows in batches of 2, twice
    assert "task ranking, before the first stage and after each stage" in text
    assert not (tmp_path / "run").exists()


def test_hub_data_is_not_downloaded(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["stages.sft.data.path=org/data"])
    assert "org/data: on the Hub, not counted" in described(recipe, tmp_path / "run")


def test_bad_data_shows_up(recipe_file, tmp_path):
    (tmp_path / "ranked.jsonl").write_text('{"prompt": "p", "completions": ["a"')
    with pytest.raises(UserError, match="ends in the middle of a record"):
        describe_recipe(load_recipe(recipe_file), tmp_path / "run")


def test_what_is_done_already_and_another_recipe(recipe_file, tmp_path):
    recipe, run = load_recipe(recipe_file), tmp_path / "run"
    checkpoint = run / "stages" / "probabilistic" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "model.safetensors").touch()
    (run / "stages" / "sft").mkdir()
    (run / "stages" / "sft" / "done.json").write_text(json.dumps({}))
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    text = described(recipe, run)
    assert "stage sft (sft): finished, will be skipped" in text
    assert "stage probabilistic (ranking): resumes from checkpoint-7" in text
    assert "would be rejected" not in text
    text = described(load_recipe(recipe_file, ["seed=5"]), run)
    assert "would be rejected" in text and "seed: 0 -> 5" in text
