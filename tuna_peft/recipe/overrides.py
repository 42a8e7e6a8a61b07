"""`a.b.c=value` on the command line, laid over a recipe before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.recipe.document import Document, KeyPath, parse_value


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Lays `overrides` over `document`, in order, in place.

    Stages are addressed by name (`stages.sft.train.learning_rate=1e-5`) or by index. Values are YAML; a mapping
    replaces the whole sub-tree. Whether the last key exists is for the schema to say, which then names the override.

    Raises:
        UserError: No `=`, a value that is no YAML, an unknown stage, or a key below something that has no keys.
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
                f"the value is {error.what}", where=where, fix="Quote texts with special signs."
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
            raise UserError(f"`{parent}` is {data!r}, which has no keys below it", where=where, fix=f"Set `{parent}`.")
        path = (*path, step)
        if last:
            data[step] = value
        elif isinstance(data, dict) and data.get(key) is None:
            data[key] = {}  # an absent or null section comes into being with its first key
            document.places[path] = where
        data = data[step]
    _forget_below(document, path)
    document.places[path] = where


def _index(data: list[Any], key: str, parent: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in data]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(data):
        return int(key)
    known = [str(name) for name in names if name is not None]
    if parent == "stages":
        raise UserError(f"the recipe has no stage `{key}`", where=where, fix=did_you_mean(key, known))
    raise UserError(f"`{parent}` has no entry `{key}`", where=where, fix=f"Give an index from 0 to {len(data) - 1}.")


def _forget_below(document: Document, path: KeyPath) -> None:
    """The lines below a replaced sub-tree no longer hold."""
    for old in [known for known in document.places if known[: len(path)] == path]:
        del document.places[old]
