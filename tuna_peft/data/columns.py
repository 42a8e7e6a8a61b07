"""Reads records of any shape: the recipe maps each part to a path such as `responses[].text`. Used by `readers`."""

from __future__ import annotations

import re
from typing import Any

from tuna_peft.data.config import Columns
from tuna_peft.data.ranked import BadRow, Prompt, Record
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import did_you_mean

_STEP = re.compile(r"\[(-?\d*)\]|([^.\[\]]+)")
_FIX = "Correct the path under `columns`, or the record."


def read_prompt(raw: Record, columns: Columns | None, template: PromptTemplate, where: str) -> tuple[Any, Any]:
    """The record's id (None without one) and its prompt."""
    assert columns is not None, "DataSource checks that the format `columns` comes with `columns`"
    identity = None if columns.id is None else one(raw, columns.id, where)
    if columns.instruction is None:
        return identity, one(raw, columns.prompt or "", where)
    instruction = one(raw, columns.instruction, where)
    given = None if columns.input is None else one(raw, columns.input, where)
    return identity, render(template, instruction, given, where)


def read_responses(raw: Record, columns: Columns | None, where: str) -> Record:
    """`completions`, `scores`, `ranks` and `reference` of a record."""
    assert columns is not None, "DataSource checks that the format `columns` comes with `columns`"
    if columns.completions is None:
        raise BadRow("`columns` has no `completions`", reason="no responses", where=where, fix=_FIX)
    best_first = columns.ranks == "best_first"
    completions = many(raw, columns.completions, where)
    scores, ranks = (
        None if paths in (None, "best_first") else [_number(value) for value in many(raw, paths, where)]
        for paths in (columns.scores, columns.ranks)
    )
    if isinstance(columns.completions, list):  # in a table, prompts with fewer responses have empty cells at the end
        absent = {
            index
            for index, text in enumerate(completions)
            if text is None and all(not order or order[index : index + 1] in ([], [None]) for order in (scores, ranks))
        }
        completions = _without(absent, completions)
        scores, ranks = (order and _without(absent, order) for order in (scores, ranks))
    return {
        "completions": completions,
        "scores": scores,
        "ranks": list(range(len(completions))) if best_first else ranks,
        "reference": None if columns.reference is None else one(raw, columns.reference, where),
    }


def _without(indices: set[int], values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if index not in indices]


def _number(value: Any) -> Any:
    """Converts text that is a number or a boolean, because all values in a CSV file are text."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word)
    except ValueError:
        return value


def render(template: PromptTemplate, instruction: Any, given: Any, where: str) -> Prompt:
    """The prompt from an instruction and an input; BadRow when one of them is not text."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadRow("the instruction is missing or empty", reason="no prompt", where=where)
    if given is not None and not isinstance(given, str):
        raise BadRow(f"the input is {type(given).__name__}, not text", reason="wrong type", where=where)
    return template.render(instruction, given, where)


def one(raw: Record, path: str, where: str) -> Any:
    """The value at a path without `[]`."""
    values, spread = _follow(raw, path, where)
    if spread:
        raise BadRow(f"`{path}` gives a list, but one value is expected", reason="wrong type", where=where, fix=_FIX)
    return values[0]


def many(raw: Record, path: str | list[str], where: str) -> list[Any]:
    """The values at a path (those that `[]` selects, the entries of a list, or one value), or one for each path."""
    if isinstance(path, list):
        return [one(raw, single, where) for single in path]
    values, spread = _follow(raw, path, where)
    if spread:
        return values
    return values[0] if isinstance(values[0], list) else [] if values[0] is None else values


def _follow(raw: Record, path: str, where: str) -> tuple[list[Any], bool]:
    """All values at a path, and whether the path contains `[]`."""
    if path in raw:  # a key may contain a dot
        return [raw[path]], False
    found: list[tuple[str, Any]] = [("", raw)]
    spread = False
    for index, name in _STEP.findall(path):
        if name:
            found = [(f"{place}.{name}".lstrip("."), _key(value, name, place, path, where)) for place, value in found]
        elif index:
            found = [(f"{place}[{index}]", _entry(value, int(index), place, path, where)) for place, value in found]
        else:
            spread = True
            found = [
                (f"{place}[{i}]", entry)
                for place, value in found
                for i, entry in enumerate(_list(value, place, path, where))
            ]
    return [value for _, value in found], spread


def _key(value: Any, name: str, place: str, path: str, where: str) -> Any:
    if isinstance(value, dict) and name in value:
        return value[name]
    holder = place or "the record"
    what, fix = f"`{path}`: {holder} has no key `{name}`", _FIX
    if isinstance(value, dict):
        fix = f"{did_you_mean(name, value)} {_FIX}"
    else:
        what += f", it is {type(value).__name__}"
    raise BadRow(what, reason="missing field", where=where, fix=fix)


def _entry(value: Any, index: int, place: str, path: str, where: str) -> Any:
    entries = _list(value, place, path, where)
    try:
        return entries[index]
    except IndexError:
        what = f"`{path}`: {place} has {len(entries)} entries, none at [{index}]"
        raise BadRow(what, reason="missing field", where=where, fix=_FIX) from None


def _list(value: Any, place: str, path: str, where: str) -> list[Any]:
    if isinstance(value, list):
        return value
    what = f"`{path}`: {place or 'the record'} is {type(value).__name__}, not a list"
    raise BadRow(what, reason="wrong type", where=where, fix=_FIX)
