"""Reads records of any shape: the recipe maps each part to a path such as `responses[].text`. Used by `readers`."""

from __future__ import annotations

import re
from typing import Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import Columns
from tuna_peft.data.grouping import rank_by_votes, votes_for, winner_index
from tuna_peft.data.in_text import parsed
from tuna_peft.data.messages import content_text
from tuna_peft.data.ranked import Prompt, Record, number, replies_alone
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


def read_responses(raw: Record, columns: Columns | None, template: PromptTemplate, where: str) -> Record:
    """`completions`, `scores`, `ranks` and `reference` of a record.

    Whole dialogues become their replies where a template for text wraps the instruction.

    A label (`winner`) or a `strength` also gives `votes`, see `tuna_peft.data.grouping`: such an order holds only
    among the responses of this record.
    """
    assert columns is not None, "DataSource checks that the format `columns` comes with `columns`"
    if columns.completions is None:
        raise BadRow("`columns` has no `completions`", reason="no responses", where=where, fix=_FIX)
    completions = many(raw, columns.completions, where)
    if columns.instruction is not None and template.name != "chat":
        completions = replies_alone(completions, where)
    found: Record = {
        "completions": completions,
        "scores": None if columns.scores is None else _scores(raw, columns.scores, where),
        "ranks": None,
        "reference": None if columns.reference is None else one(raw, columns.reference, where),
    }
    if columns.ranks == "best_first":
        found["ranks"] = list(range(len(completions)))
    elif columns.ranks is not None:
        found["ranks"] = _numbers(many(raw, columns.ranks, where))
    elif columns.winner is not None:
        paths = columns.winner if isinstance(columns.winner, list) else [columns.winner]
        labels = [one(raw, path, where) for path in paths]
        labels = [label for label in labels if label is not None] or [None]  # who did not vote does not count
        winners = [winner_index(label, completions, columns.winner_labels, where) for label in labels]
        found["votes"] = [vote for winner in winners for vote in votes_for(winner, len(completions))]
        found["ranks"], found["contradictions"] = rank_by_votes(len(completions), found["votes"])
        found["comparisons"] = len(found["votes"])
    elif columns.strength is not None:
        if len(completions) != 2:
            what = f"`strength` compares two responses, the record has {len(completions)}"
            raise BadRow(what, reason="different numbers of scores and responses", where=where, fix=_FIX)
        strength = number(_scores(raw, columns.strength, where)[0], "strength", where)
        found["scores"], found["votes"] = [0.0, strength], [(0, 1, -strength)]
    if isinstance(columns.completions, list):  # in a table, prompts with fewer responses have empty cells at the end
        orders = [found["scores"], found["ranks"]]
        absent = {
            index
            for index, text in enumerate(completions)
            if text is None and all(not order or order[index : index + 1] in ([], [None]) for order in orders)
        }
        for part in ("completions", "scores", "ranks") if absent else ():
            found[part] = found[part] and [value for i, value in enumerate(found[part]) if i not in absent]
    return found


def _scores(raw: Record, paths: str | list[str] | dict[str, float], where: str) -> list[Any]:
    """The scores, or the weighted sum of several scores of each response; None where one of them is missing."""
    if not isinstance(paths, dict):
        return _numbers(many(raw, paths, where))
    parts = {path: _numbers(many(raw, path, where)) for path in paths}
    if len(sizes := {len(values) for values in parts.values()}) > 1:
        found = ", ".join(f"{len(values)} in `{path}`" for path, values in parts.items())
        what = f"the scores to add up are of different responses: {found}"
        raise BadRow(what, reason="different numbers of scores and responses", where=where, fix=_FIX)
    return [
        sum(
            weight * number(parts[path][index], "score", f"{where}, candidate {index}, `{path}`")
            for path, weight in paths.items()
        )
        for index in range(sizes.pop() if sizes else 0)
    ]


def _numbers(values: list[Any]) -> list[Any]:
    return [as_number(value) for value in values]


def as_number(value: Any) -> Any:
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
    if isinstance(instruction, list):
        instruction = content_text(instruction, where)
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
    if path.isdigit():  # a column of a table, counted from 1
        if not 1 <= int(path) <= len(raw):
            what = f"there is no column {path}, there are {len(raw)}"
            raise BadRow(what, reason="missing field", where=where, fix=_FIX)
        return [list(raw.values())[int(path) - 1]], False
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
    value = parsed(value, "{")
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
    value = parsed(value, "[")
    if isinstance(value, list):
        return value
    what = f"`{path}`: {place or 'the record'} is {type(value).__name__}, not a list"
    raise BadRow(what, reason="wrong type", where=where, fix=_FIX)
