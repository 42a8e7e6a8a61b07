"""Loads a YAML file with overrides as a checked `Recipe`; every command that takes a recipe calls `load_recipe`."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tuna_peft.errors import did_you_mean
from tuna_peft.recipe.document import Document, KeyPath
from tuna_peft.recipe.evaluation_schema import AUTOMATIC, NAMED
from tuna_peft.recipe.feedback_schema import FEEDBACK, FILE, FeedbackSource
from tuna_peft.recipe.layers import EXTENDS, apply_overrides, read_recipe
from tuna_peft.recipe.messages import Problem, expected, raise_problems
from tuna_peft.recipe.paths import missing_paths, resolve_paths
from tuna_peft.recipe.schema import Recipe
from tuna_peft.recipe.shipped import find_recipe
from tuna_peft.recipe.train_fields import check_train


def load_recipe(
    recipe: str | Path, overrides: Sequence[str] = (), *, check: bool = True, missing: bool = False
) -> Recipe:
    """Loads, overrides and checks a recipe.

    A recipe may extend another, see `layers.read_recipe`. Local paths become absolute: relative ones are looked up in
    the current directory, then in the folder of the recipe, then in the folders of the recipes it extends.

    Args:
        recipe: A file, or the name of a shipped recipe.
        overrides: `a.b.c=value`, see `apply_overrides`.
        check: Also run the slower checks: the fields of every stage's `train` against the trainers' configurations
            (imports torch), and that local paths exist.
        missing: Local paths need not exist (the data will be created later).

    Raises:
        UserError: All mistakes, each with file and line or override, dotted key, and what was expected.
    """
    document = read_recipe(find_recipe(recipe))
    apply_overrides(document, overrides)
    try:
        # strict: YAML is typed, so "8" in quotes is text and must not become a number
        loaded = Recipe.model_validate(document.data, strict=True)
    except ValidationError as error:
        problems = _schema_problems(error, document)
        raise_problems(problems + (_train_problems(document) if check else []))
        raise
    resolve_paths(loaded, document.folders)
    if check:
        problems = _train_problems(document)
        for path, what, fix in [] if missing else missing_paths(loaded, document.folders):
            problems.append(Problem(document.place(path), document.dotted(path), what, fix))
        raise_problems(problems)
    return loaded


def _train_problems(document: Document) -> list[Problem]:
    """Checks the plain data, so that these mistakes are listed even if the recipe has others as well."""
    problems = []
    stages = document.data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        train = stage.get("train") if isinstance(stage, dict) else None
        if not isinstance(train, dict) or stage.get("type") not in ("sft", "ranking"):
            continue
        for key, what, fix in check_train(stage["type"], train):
            path = ("stages", index, "train", key)
            problems.append(Problem(document.place(path), document.dotted(path), what, fix))
    return problems


def _schema_problems(error: ValidationError, document: Document) -> list[Problem]:
    """One problem per key: a value that fits no alternative of a union gives pydantic one error per alternative."""
    grouped: dict[KeyPath, list[Any]] = {}
    for entry in error.errors():
        grouped.setdefault(_real_path(entry, document.data), []).append(entry)
    problems = []
    for path, entries in grouped.items():
        what, fix = _explain(entries, path)
        problems.append(Problem(document.place(path), document.dotted(path), what, fix))
    return problems


def _explain(entries: list[Any], path: KeyPath) -> tuple[str, str | None]:
    kind = entries[0]["type"]
    if kind == "missing":
        return "this key is required.", None
    if kind == "extra_forbidden":
        return "unknown key.", did_you_mean(str(path[-1]), _valid_keys(path[:-1], entries[0]["loc"]))
    value = entries[0]["input"]
    quotes = not isinstance(value, str) and all(entry["type"] == "string_type" for entry in entries)
    return expected(entries, value), "Put it in quotes." if quotes and isinstance(value, int | float) else None


def _real_path(entry: Any, data: Any) -> KeyPath:
    """The keys of the recipe in an error's location, without the names of union members that pydantic adds."""
    path: list[str | int] = []
    for key in entry["loc"]:
        if key in (FILE, FEEDBACK, AUTOMATIC, NAMED):
            continue
        inside = isinstance(data, dict) and key in data or isinstance(data, list) and isinstance(key, int)
        if not inside:
            if entry["type"] == "missing" and key == entry["loc"][-1]:
                path.append(key)
            break
        path.append(key)
        data = data[key]
    return tuple(path)


def _valid_keys(path: KeyPath, loc: tuple[str | int, ...]) -> list[str]:
    """The valid keys at `path`; `loc` is the error's whole location, with the names of union members."""
    models: list[Any] = [Recipe]
    for key in path:
        if isinstance(key, str):
            fields = [_fields(model)[key] for model in models if key in _fields(model)]
            models = [model for field in fields for model in _models_in(field.annotation)]
            if FeedbackSource in models:  # a union with a file's
                models = [model for model in models if (model is FeedbackSource) == (FEEDBACK in loc)]
    return [*(name for model in models for name in _fields(model)), *([] if path else [EXTENDS])]


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a model by their names in recipes."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if parts := typing.get_args(annotation):
        return [model for part in parts for model in _models_in(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
