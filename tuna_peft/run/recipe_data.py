"""The data of a recipe or of a run for other commands: the data itself, and how its records are read.

`tuna_peft.cli.data_options` calls this for `--recipe`, and where a recipe stands in place of a data file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuna_peft.data.config import DataSource
from tuna_peft.data.readers import fits
from tuna_peft.data.sources import read_records
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.evaluation.results import RUN_INFO
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.schema import Recipe
from tuna_peft.recipe.shipped import shipped_recipes

# The settings that say how records are read, not which ones.
_READING = {"format", "header", "columns", "group_by", "markers", "add_reference", "length_penalty", "on_bad_row"}


def find_recipe_of_data(text: str) -> tuple[Recipe, str | None] | None:
    """The recipe, and the stage if one is named, that `RECIPE[@STAGE]` names; None if it names no recipe.

    Args:
        text: A .yaml file, the name of a shipped recipe, or a run's folder.

    Raises:
        UserError: There is no such recipe or stage, or the recipe has mistakes.
    """
    name, stage = text, None
    if not Path(text).exists() and "@" in text:
        name, _, stage = text.rpartition("@")
    path = Path(name)
    if (path / RUN_INFO).is_file():
        from tuna_peft.run.folder import read_run_recipe  # imports torch

        recipe = read_run_recipe(path)
    elif name.endswith((".yaml", ".yml")) or (not path.exists() and name in shipped_recipes()):
        recipe = load_recipe(name, check=False)
    else:
        recipe = None
    if recipe is None:
        return None
    names = [one.name for one in recipe.stages]
    if stage is not None and stage not in names:
        raise UserError(f"the recipe has no stage {stage!r}", where=name, fix=did_you_mean(stage, names))
    return recipe, stage


def only_source(recipe: Recipe, stage: str | None, where: str) -> DataSource:
    """The data of a stage, or that of all stages if they have the same.

    Raises:
        UserError: The stages have different data, and none is named.
    """
    found = {one.name: one.source for one in recipe.stages if stage in (None, one.name)}
    first, *others = found.values()
    if any(other != first for other in others):
        titles = ", ".join(f"{name} ({source.title})" for name, source in found.items())
        raise UserError(
            f"the stages of this recipe have different data: {titles}",
            where=where,
            fix=f"Name the stage: {where}@{next(iter(found))}.",
        )
    return first


def reading_settings(
    given: dict[str, Any], recipe: Recipe, stage: str | None = None, *, required: bool
) -> dict[str, Any]:
    """The settings with which `recipe` would read the records of another file.

    Where the data sets of the recipe are read in different ways, the first way that suits the first record is taken.

    Args:
        given: The file, as keys of `DataSource`: its `path`, and settings that hold in any case.
        recipe: The recipe.
        stage: Only this stage's data; None is all data, with that of the evaluation.
        required: Return the first way where none suits. Otherwise nothing is returned then.

    Returns:
        Keys of `DataSource` that differ from their defaults.

    Raises:
        UserError: The file cannot be read.
    """
    ways = _ways(recipe, stage)
    if required and len(ways) == 1:
        return ways[0]
    for way in ways:
        source = DataSource.model_validate({**way, **given, "limit": 1})
        if fits(source, next(read_records(source))[1]):
            return way
    return ways[0] if required else {}


def _ways(recipe: Recipe, stage: str | None) -> list[dict[str, Any]]:
    """The different ways in which the data of a recipe is read."""
    names = [one.name for one in recipe.stages]
    ways: list[dict[str, Any]] = []
    for key, source in recipe.sources().items():
        if isinstance(source, DataSource) and (stage is None or key[:2] == ("stages", names.index(stage))):
            way = source.model_dump(include=_READING, exclude_defaults=True)
            if way not in ways:
                ways.append(way)
    return ways
