"""Writes a recipe with all its defaults, for the run's folder, and lists the differences between two recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tuna_peft.recipe.document import RecipeDumper
from tuna_peft.recipe.schema import Recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default written out; `load_recipe` reads it back as an equal recipe.

    Null keys are omitted, because null is the default of every key that may be null, except for `evaluation`.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    data.setdefault("evaluation", None)
    return yaml.dump(data, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def diff_recipes(old: Recipe, new: Recipe) -> list[str]:
    """A line such as `stages.sft.train.learning_rate: 0.001 -> 0.002` for every key that differs."""
    before, after = (_flat(recipe.model_dump(mode="json", exclude_none=True)) for recipe in (old, new))
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    return [f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in changed]


def sizes_begun_with(begun: dict[str, Any], recipe: Recipe) -> dict[str, int]:
    """The numbers that a run began with for sizes that are `auto` in `recipe`, by their keys.

    `auto` was not their default in earlier versions, so the same file still means the same run. A training stage is
    not included: its `max_tokens_per_batch` had no other default.

    Args:
        begun: The contents of the run's `recipe.yaml`.
    """
    old, new = _flat(begun), _flat(recipe.model_dump(mode="json", exclude_none=True))
    return {
        key: old[key]
        for key, value in new.items()
        if value == "auto" and ".train." not in key and isinstance(old.get(key), int)
    }


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy of `recipe` with other values for some dotted keys, such as `stages.sft.train.max_steps`."""
    recipe = recipe.model_copy(deep=True)
    for key, value in values.items():
        *parts, last = key.split(".")
        place: Any = recipe
        for part in parts:
            if isinstance(place, list):  # the stages
                place = next(stage for stage in place if stage.name == part)
            else:
                place = place[part] if isinstance(place, dict) else getattr(place, part)
        if isinstance(place, dict):
            place[last] = value
        else:
            setattr(place, last, value)
    return recipe


_ABSENT = object()


def _shown(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    stages = data.get("stages", [])
    return {
        **_leaves({key: value for key, value in data.items() if key != "stages"}, ""),
        "order of stages": [stage["name"] for stage in stages],
        **_leaves({stage["name"]: stage for stage in stages}, "stages."),
    }


def _leaves(data: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
