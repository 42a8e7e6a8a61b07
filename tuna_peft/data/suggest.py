"""Guesses the settings that would read a record, for `data inspect` and for errors: `columns`, perhaps `group_by`."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import yaml

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.columns import as_number
from tuna_peft.data.config import DataSource
from tuna_peft.data.grouping import winner_index
from tuna_peft.data.ranked import Record
from tuna_peft.errors import UserError, listed

_PROMPTS = ("instruction", "prompt", "question", "query", "context", "history", "post", "task", "problem", "input")
_RESPONSES = ("response", "completion", "answer", "output", "reply", "generation", "generated", "candidate", "text")
_SCORES = ("score", "rating", "reward", "grade", "helpful", "quality", "correct", "label", "stars", "points")
_RANKS = ("rank", "place", "position")
_INPUTS = ("input", "context", "text", "passage", "document", "article", "paragraph", "code")  # whole names
_REFERENCES = ("reference", "gold", "ground_truth", "reference_answer")  # whole names
_WINNERS = ("winner", "preference", "preferred", "choice", "vote", "better", "label", "verdict", "decision")
_NESTED = (*_PROMPTS, *_RESPONSES, "content", "value")  # names of texts in an object


def suggest(record: Record) -> tuple[dict[str, Any], list[str]]:
    """The settings of `DataSource` that would read records like this one, and the decisions that are missing.

    Args:
        record: A raw record; the values of a CSV file are text.
    """
    columns: dict[str, Any] = {}
    settings: dict[str, Any] = {"columns": columns}
    record = record | {  # such as `question.full_text`
        f"{key}.{name}": entry
        for key, value in record.items()
        if isinstance(value, dict)
        for name, entry in value.items()
        if not isinstance(entry, str) or _best(_NESTED, {name: entry})  # no ids and names of models
    }
    texts = {key: value for key, value in record.items() if isinstance(value, str) and not _is_number(value)}
    lists = {key: value for key, value in record.items() if isinstance(value, list) and len(value) > 1}
    prompt = _best(_PROMPTS, texts) or _named(("q", "text"), texts)
    if prompt == "text" and not (_siblings(texts) or lists or _best(_RESPONSES[:-1], texts)):
        prompt = None  # it may as well be the response
    if prompt:
        columns["instruction"] = prompt
        if isinstance(record.get("system"), str):
            columns["system"] = "system"
    texts.pop(prompt or "", None)
    wide = _siblings(texts)
    lower = {key.lower(): key for key in texts}
    if {"chosen", "rejected"} <= lower.keys():
        columns |= {"completions": [lower["chosen"], lower["rejected"]], "ranks": "best_first"}
    elif nested := next((key for key, value in lists.items() if all(isinstance(one, dict) for one in value)), None):
        first = lists[nested][0]
        text = _best(_RESPONSES, {key: value for key, value in first.items() if isinstance(value, str)})
        if text:
            columns["completions"] = f"{nested}[].{text}"
        verdicts = [key for key, value in first.items() if isinstance(value, bool)]
        order = _order(first) or ({"scores": verdicts[0]} if len(verdicts) == 1 else {})
        columns |= {part: f"{nested}[].{key}" for part, key in order.items()}
    elif several := _best(
        _RESPONSES, {key: value for key, value in lists.items() if all(isinstance(one, str) for one in value)}
    ):
        columns["completions"] = several
        numbers = {key: value[0] for key, value in lists.items() if len(value) == len(lists[several])}
        columns |= _order(numbers)
    elif wide:
        columns["completions"] = wide
        scores = _siblings({key: value for key, value in record.items() if _is_number(value)}, len(wide))
        if scores:
            columns["scores"] = scores
    elif single := _best(_RESPONSES, texts):
        columns["completions"] = single
        order = _order(record)
        columns |= order
        if order and prompt:
            settings["group_by"] = prompt
    rest = {key: record[key] for key in unused(record, columns) if isinstance(record[key], str | None)}
    for part, names in (("input", _INPUTS), ("reference", _REFERENCES)):
        if prompt and (name := _named(names, rest)):
            columns[part] = name
    several_responses = "completions" in columns and columns["completions"] not in list(texts)
    if several_responses and not columns.keys() & _ORDERS:
        responses = set(wide)
        rest = {
            key: value for key, value in record.items() if not (key in responses or isinstance(value, dict | list))
        }
        if strength := next((key for key, value in rest.items() if _is_strength(key, value)), None):
            columns["strength"] = strength
        elif winner := _best(_WINNERS, {key: value for key, value in rest.items() if _is_label(key, value)}):
            columns["winner"] = winner
    keys = listed(f"`{key}`" for key in record)
    missing = [
        f"{what} ({keys})"
        for what, found in (
            ("which of these is the prompt: `instruction`, or `prompt` if it is complete", "instruction" in columns),
            ("which of these are the responses: `completions`", "completions" in columns),
            ("what orders the responses: `scores`, `ranks`, `winner` or `strength`", columns.keys() & _ORDERS),
        )
        if not found
    ]
    return settings, missing


def unused(record: Record, columns: dict[str, Any]) -> list[str]:
    """The keys of a record that no path in `columns` begins with."""
    paths = [path for value in columns.values() for path in ([value] if isinstance(value, str) else value)]
    used = {path[:end] for path in paths for end in (len(path), *(at for at, sign in enumerate(path) if sign in ".["))}
    return [key for key in record if key not in used]


_ORDERS = {"scores", "ranks", "winner", "strength"}


def data_block(source: DataSource, settings: dict[str, Any] | None = None) -> str:
    """The `data:` lines of a recipe for a source.

    Args:
        source: Whatever it says beyond the defaults is written.
        settings: Keys to add.
    """
    given = source.model_dump(exclude_defaults=True, exclude_none=True)
    return str(
        yaml.safe_dump(
            {"data": given | (settings or {})}, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
        )
    ).rstrip()


def _is_number(value: Any) -> bool:
    return isinstance(as_number(value), int | float)


def _is_strength(key: str, value: Any) -> bool:
    """Whether a number is a signed preference for sure; a positive one may as well say which response is better."""
    number = as_number(value)
    return isinstance(number, float | int) and ("strength" in key.lower() or "prefer" in key.lower() and number < 0)


def _is_label(key: str, value: Any) -> bool:
    """Whether a value may say which response is better: a number or a word, no sentence and no strength."""
    if _is_number(value):
        return "prefer" not in key.lower() and "label" not in key.lower()
    with contextlib.suppress(BadRow):
        winner_index(value, [None, None], None, "")
        return True
    return False


def _best(words: tuple[str, ...], record: Record) -> str | None:
    """The key that contains the first of the words that any key contains."""
    return next((key for word in words for key in record if word in key.lower()), None)


def _named(names: tuple[str, ...], record: Record) -> str | None:
    """The first key that is one of the names, in any case."""
    return next((key for name in names for key in record if key.lower() == name), None)


def _order(record: Record) -> dict[str, str]:
    """The key of the score, or of the rank, of a response."""
    numbers = {key: value for key, value in record.items() if _is_number(value)}
    if rank := _best(_RANKS, numbers):
        return {"ranks": rank}
    score = _best(_SCORES, numbers)
    return {"scores": score} if score else {}


def _siblings(record: Record, count: int | None = None) -> list[str]:
    """The keys that differ only in a letter or number, such as `answer_a` and `answer_b`; at least two, or `count`."""
    stems: dict[str, list[str]] = {}
    for key in record:
        # `answer_a`, `response2`, `score_b`; then `a_score`, `model_1_rating`
        match = re.fullmatch(r"(.*?[a-z])[_ -]?(?:(?<=[_ -])[a-fA-F]|[A-F]|\d+)", key) or re.fullmatch(
            r"\w+?[_ -]([a-z]+)", key
        )
        match = match or re.fullmatch(r"(\w?)[a-f]", key)  # `a` and `b`, `sa` and `sb`
        if match:
            stems.setdefault(match[1].lower(), []).append(key)
    fitting = [keys for keys in stems.values() if (len(keys) == count if count else len(keys) > 1)]
    return max(fitting, key=len, default=[])


def undecided(fitting: list[str], where: str) -> UserError:
    """The error for records that more than one format may describe."""
    if fitting == ["labels"]:
        return UserError(
            "these records may be several responses with a label each, or TRL's stepwise supervision (the steps of "
            "one response), which is no ranking",
            where=where,
            fix="For several responses write `format: labels` (`--format labels`).",
        )
    names = " or ".join(f"`{name}`" for name in fitting)
    return UserError(
        f"these records may be of the formats {names}",
        where=where,
        fix=f"Write one of them as `format`, for example `format: {fitting[-1]}` (`--format {fitting[-1]}`).",
    )
