"""Resolves the local paths of a recipe and finds missing ones, for `load`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from tuna_peft.data.config import MayBeLocal
from tuna_peft.data.shards import COMPRESSED, SUFFIXES, address_fix, is_hub_id, is_pattern, match_pattern
from tuna_peft.errors import did_you_mean
from tuna_peft.evaluation.files import how_to_fetch
from tuna_peft.recipe.document import KeyPath
from tuna_peft.recipe.resolved import stage_names
from tuna_peft.recipe.schema import Recipe

_FETCHED: dict[str | int, str] = {"superni": "natural-instructions", "lmentry": "lmentry", "vicuna": "vicuna"}
_DATA_SUFFIXES = (*SUFFIXES, *COMPRESSED, ".txt")


def resolve_paths(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Makes every local path in `recipe` absolute, in place: looked up in the current directory, then in `folders`.

    A run can be resumed from another directory, and the recipe in its folder must still name the same data. A path
    that is not found stays unchanged, because it may be a Hub id.
    """
    for _, section, name, kind in _named(recipe):
        value = getattr(section, name)
        several = isinstance(value, list)
        resolved = [_resolve(text, kind, folders) for text in (value if several else [value])]
        setattr(section, name, resolved if several else resolved[0])


def missing_paths(recipe: Recipe, folders: Sequence[Path]) -> Iterator[tuple[KeyPath, str, str]]:
    """`(path of keys, what, fix)` for every value that can only be a local path, or a stage, and does not exist.

    Also for the revision of a model that is a local path.
    """
    for path, section in sections(recipe):
        model = getattr(section, "model", None)
        if isinstance(model, str) and getattr(section, "revision", None) and _is_local(model):
            yield (*path, "revision"), "this is for models on the Hub, and the model is a folder.", "Remove it."
    for path, section, name, kind in _named(recipe):
        value = getattr(section, name)
        stages = stage_names(recipe) if kind.only_file else []
        if kind.only_file and not (value in stages or _must_be_local(value) or Path(value).is_file()):
            yield path, f"there is no file {value!r}, and no stage of that name.", did_you_mean(value, stages)
        for text in value if isinstance(value, list) else [value]:
            if (kind.required or _must_be_local(text)) and not _exists(Path(text).expanduser()):
                beside = ", ".join(map(str, folders))
                what = f"there is no file or folder {text!r} here or next to the recipe ({beside})."
                fix = address_fix(text) or _nearby(text, folders)
                if path[:2] == ("evaluation", "tasks") and path[2] in _FETCHED:
                    fix += f" {how_to_fetch(_FETCHED[path[2]])}"
                yield path, what, fix


def sections(section: BaseModel, path: KeyPath = ()) -> Iterator[tuple[KeyPath, BaseModel]]:
    """The section itself and all sections inside of it, each with its path of keys."""
    yield path, section
    for name in type(section).model_fields:
        value = getattr(section, name)
        for index, inner in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(inner, BaseModel):
                place = (index,) if isinstance(value, list) else ()
                yield from sections(inner, (*path, name, *place))


def _named(recipe: Recipe) -> Iterator[tuple[KeyPath, BaseModel, str, MayBeLocal]]:
    """Every field marked `MayBeLocal` that is set: its path of keys, its section, its name there, its mark."""
    for path, section in sections(recipe):
        for name, field in type(section).model_fields.items():
            for mark in field.metadata:
                if isinstance(mark, MayBeLocal) and getattr(section, name) is not None:
                    yield (*path, name), section, name, mark


def _resolve(text: str, kind: MayBeLocal, folders: Sequence[Path]) -> str:
    if text.startswith("builtin:"):
        return text
    path = Path(text).expanduser()
    for folder in (Path.cwd(), *folders):
        if (folder / path).is_file() or (_exists(folder / path) and not kind.only_file):
            return str((folder / path).resolve())
    return text


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder, or a file that matches the pattern."""
    return path.exists() or (is_pattern(str(path)) and bool(match_pattern(str(path))))


def _is_local(model: str) -> bool:
    """Whether a model is in the package or in a folder."""
    return model.startswith("builtin:") or Path(model).expanduser().is_dir()


def _must_be_local(text: str) -> bool:
    if text.startswith("builtin:"):
        return False
    return text.startswith(".") or not is_hub_id(text) or text.lower().endswith(_DATA_SUFFIXES)


def _nearby(text: str, folders: Sequence[Path]) -> str:
    """The most similar name in the folders where the file was expected, or a list of the files there."""
    path = Path(text).expanduser()
    parents = dict.fromkeys((folder / path.parent).resolve() for folder in (Path.cwd(), *folders))
    entries = [entry.name for parent in parents if parent.is_dir() for entry in sorted(parent.iterdir())]
    names = [name for name in entries if not name.startswith(".")]
    return did_you_mean(path.name, names, most=8) if names else "Give its path after the command, as key=path."
