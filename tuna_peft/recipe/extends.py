"""`extends: other.yaml`: a recipe that says only how it differs from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.recipe.document import Document, KeyPath, read_document
from tuna_peft.recipe.shipped import shipped_recipes

EXTENDS = "extends"
EXTENDS_HELP = (
    "The recipe that this one is laid over: a path relative to this file, or the name of a shipped recipe. Mappings "
    "are merged key by key, stages by their name; every other value replaces the inherited one."
)


def read_recipe(file: Path) -> Document:
    """Reads a recipe file and, below it, what it extends; every key keeps the file and line that it comes from.

    Raises:
        UserError: See `read_document`; what is extended does not exist, or extends itself.
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
    _lay_over(below, document, (), ())
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
        f"there is no recipe {name!r} beside this one, nor of that name in the package",
        where=where,
        fix=did_you_mean(name.removesuffix(".yaml"), known),
    )


def _lay_over(below: Document, over: Document, path: KeyPath, over_path: KeyPath) -> None:
    """Merges the mapping of `over` at `over_path` into the one of `below` at `path`, in place."""
    data, new = _at(below.data, path), _at(over.data, over_path)
    for key, value in new.items():
        here, there = (*path, key), (*over_path, key)
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            below.places[here] = over.place(there)
            _lay_over(below, over, here, there)
        elif here == ("stages",) and isinstance(value, list) and isinstance(data.get(key), list):
            _lay_over_stages(below, over)
        else:
            _replace(below, over, here, there)


def _lay_over_stages(below: Document, over: Document) -> None:
    stages = below.data["stages"]
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for index, stage in enumerate(over.data["stages"]):
        there = ("stages", index)
        name = stage.get("name") if isinstance(stage, dict) else None
        if name is not None and name in names:
            _lay_over(below, over, ("stages", names.index(name)), there)
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
