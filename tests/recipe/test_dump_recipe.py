"""The recipe as written into a run's folder, and its differences from another one."""

from __future__ import annotations

import yaml

from tuna_peft.recipe.dump import diff_recipes, dump_recipe
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.schema import Recipe

OVERRIDES = [
    "stages.sft.train.optim_args=1e-5_is_text",
    "stages.sft.train.lr_scheduler_kwargs=null",
    'prompt.template="Q: {instruction}\\n\\nA:  "',
    "base.model=some/base",
    'base.revision="1e5"',
    "lora.target_modules=[q_proj, 'no']",
]


def test_what_is_dumped_loads_back_equal(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, OVERRIDES)
    dumped = tmp_path / "run" / "recipe.yaml"
    dumped.parent.mkdir()
    dumped.write_text(dump_recipe(recipe))
    assert load_recipe(dumped) == recipe
    assert diff_recipes(load_recipe(dumped), recipe) == []
    # Other tools read it as plain YAML.
    assert Recipe.model_validate(yaml.safe_load(dumped.read_text())) == recipe


def test_differences_are_named_with_both_values(recipe_file):
    old = load_recipe(recipe_file, check=False)
    overrides = [
        "seed=1",
        "lora.r=8",
        "stages.sft.train.learning_rate=1e-5",
        "stages.sft.train.weight_decay=0.1",
        "stages.probabilistic.lora.r=2",
        "evaluation=null",
    ]
    new = load_recipe(recipe_file, overrides, check=False)
    differences = diff_recipes(old, new)
    assert "seed: 0 -> 1" in differences
    assert "lora.r: 16 -> 8" in differences
    assert "stages.sft.train.learning_rate: 0.001 -> 1e-05" in differences
    assert "stages.sft.train.weight_decay: absent -> 0.1" in differences
    assert "evaluation.batch_size: 'auto' -> absent" in differences
    assert not any("alpha" in line for line in differences)


def test_stages_are_compared_by_name(recipe_file):
    old = load_recipe(recipe_file, check=False)
    new = old.model_copy(update={"stages": old.stages[::-1]})
    assert diff_recipes(old, new) == [
        "order of stages: ['sft', 'probabilistic'] -> ['probabilistic', 'sft']",
    ]


def test_both_spellings_of_a_value_are_one(recipe_file):
    """Recipes and run folders of earlier versions say `dequantised`."""
    british, american = (
        load_recipe(recipe_file, [f"export.merge.base={spelling}"], check=False)
        for spelling in ("dequantised", "dequantized")
    )
    assert british == american and diff_recipes(british, american) == []
    assert "base: dequantized" in dump_recipe(british)
