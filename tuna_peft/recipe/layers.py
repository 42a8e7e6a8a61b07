"""Merges the layers of a recipe: the recipe it `extends`, its own keys, then overrides (`a.b.c=value`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.recipe.document import Document, KeyPath, parse_value, read_document
from tuna_peft.recipe.shipped import shipped_recipes

EXTENDS = "extends"
EXTENDS_HELP = (
    "The recipe to start from: a path relative to this file, or the name of a shipped recipe. Mappings are merged key "
    "by key and stages by name; every other value replaces the inherited one."
)


def read_recipe(file: Path) -> Document:
    """Reads a recipe file and the recipes it extends, merged; every key keeps its file and line.

    Raises:
        UserError: See `read_document`; or the extended recipe does not exist, or extends itself.
    """
    return _read(file, ())


def _read(file: Path, above: tuple[Path, ...]) -> Document:
    document, above = read_document(file), (*above, file.resolve())
    if EXTENDS not in document.data:
        return document
    where, name = document.place((EXTENDS,)), document.data.pop(EXTENDS)
    if not isinstance(name, str):
        raise UserError(f"`{EXTENDS}` is the path of a recipe, found {name!r}", where=where)
    parent = _find(name, file.parent, where)
    if parent.resolve() in above:
        chain = " -> ".join(path.name for path in (*above, parent))
        raise UserError(f"the recipe extends itself: {chain}", where=where, fix=f"Remove this `{EXTENDS}`.")
    below = _read(parent, above)
    _merge_mapping(below, document, (), ())
    below.folders = list(dict.fromkeys([*document.folders, *below.folders]))
    return below


def _find(name: str, folder: Path, where: str) -> Path:
    path = folder / Path(name).expanduser()
    for candidate in (path, path.with_name(path.name + ".yaml")):
        if candidate.is_file():
            return candidate
    known = shipped_recipes()
    if (shipped := known.get(name.removesuffix(".yaml"))) is not None:
        return shipped
    raise UserError(
        f"there is no recipe {name!r} next to this file, and none with that name in the package",
        where=where,
        fix=did_you_mean(name.removesuffix(".yaml"), known),
    )


def _merge_mapping(below: Document, over: Document, path: KeyPath, over_path: KeyPath) -> None:
    """Merges the mapping at `over_path` of `over` into the one at `path` of `below`, in place."""
    data, new = _at(below.data, path), _at(over.data, over_path)
    for key, value in new.items():
        here, there = (*path, key), (*over_path, key)
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            below.places[here] = over.place(there)
            _merge_mapping(below, over, here, there)
        elif here == ("stages",) and isinstance(value, list) and isinstance(data.get(key), list):
            _merge_stages(below, over)
        else:
            _replace(below, over, here, there)


def _merge_stages(below: Document, over: Document) -> None:
    stages = below.data["stages"]
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for index, stage in enumerate(over.data["stages"]):
        there = ("stages", index)
        name = stage.get("name") if isinstance(stage, dict) else None
        if name is not None and name in names:
            _merge_mapping(below, over, ("stages", names.index(name)), there)
        else:
            stages.append(None)
            _replace(below, over, ("stages", len(stages) - 1), there)


def _replace(below: Document, over: Document, here: KeyPath, there: KeyPath) -> None:
    below.places = {path: place for path, place in below.places.items() if path[: len(here)] != here}
    below.places |= {
        (*here, *path[len(there) :]): place for path, place in over.places.items() if path[: len(there)] == there
    }
    _at(below.data, here[:-1])[here[-1]] = _at(over.data, there)


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Applies `overrides` to `document`, in order, in place.

    Stages are addressed by name (`stages.sft.train.learning_rate=1e-5`) or by index. Values are YAML; a mapping
    replaces the whole subtree. Unknown keys are found later, by the schema; the error then names the override.

    Raises:
        UserError: No `=`, a value that is not YAML, an unknown stage, or a key below a value that has no keys.
    """
    for text in overrides:
        where = f"override `{text}`"
        dotted, equals, value_text = text.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError("expected key=value", where=where, fix="For example: stages.sft.train.learning_rate=1e-5")
        try:
            value = parse_value(value_text)
        except UserError as error:
            raise UserError(
                f"cannot read the value: {error.what}", where=where, fix="Put text with special characters in quotes."
            ) from error
        _set(document, keys, value, where)


def _set(document: Document, keys: list[str], value: Any, where: str) -> None:
    data: Any = document.data
    path: KeyPath = ()
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(data, list):
            step: str | int = _index(data, key, ".".join(keys[:position]), where)
        elif isinstance(data, dict):
            step = key
        else:
            parent = ".".join(keys[:position])
            raise UserError(f"`{parent}` is {data!r}, which has no keys", where=where, fix=f"Set `{parent}`.")
        path = (*path, step)
        if last:
            data[step] = value
        elif isinstance(data, dict) and data.get(key) is None:
            data[key] = {}  # setting its first key creates an absent or null section
            document.places[path] = where
        data = data[step]
    _forget_below(document, path)
    document.places[path] = where


def _index(data: list[Any], key: str, parent: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in data]
    if key in names:
        return names.index(key)
    if key in map(str, range(len(data))):
        return int(key)
    known = [str(name) for name in names if name is not None]
    if parent == "stages":
        raise UserError(f"the recipe has no stage `{key}`", where=where, fix=did_you_mean(key, known))
    raise UserError(f"`{parent}` has no entry `{key}`", where=where, fix=f"Give an index from 0 to {len(data) - 1}.")


def _forget_below(document: Document, path: KeyPath) -> None:
    """Removes the places of keys below `path`, which was replaced."""
    for old in [known for known in document.places if known[: len(path)] == path]:
        del document.places[old]
