"""Grades any response to any task between 0 and 1, by program.

The grade is content times form. Content: 1 right, in between for a part of a list or a bare value, low for a wrong
answer of the right kind, 0 for none (off task, empty, the prompt repeated). Form: 1 when the response is the answer
and nothing else, less the more is said around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuna_peft.assets import pico_lexicon

WRONG = 0.2
"""Content of an answer that is of the right kind and wrong."""
REPEATED_INPUT = 0.1
"""Content of the input handed back unchanged."""
BARE_VALUE = 0.5
"""Content of a right value where a sentence was expected."""
OWN_WORDS = 0.8
"""Content of a right value in a sentence of other words."""

_ITEMS = frozenset(
    [*pico_lexicon.WORDS, *(pico_lexicon.plural(word) for word in pico_lexicon.WORDS)]
    + [str(n) for n in range(10 * pico_lexicon.MAX_NUMBER)]
)


def grade(record: Mapping[str, Any], response: str) -> float:
    """The grade of `response` as an answer to `record` (a task of this world).

    Args:
        record: A task: `instruction`, `input`, `output` and `answer`, see `task.Task`.
        response: Any text, without the prompt.

    Returns:
        A number from 0 (off task) to 1 (right, and in the asked form).
    """
    said = words(response)
    if not said or said == words(record["instruction"]):
        return 0.0
    answer = record["answer"]
    if answer["kind"] == "sentence":
        content, used = _grade_sentence(record, response)
    else:
        found = [word for word in said if word in _ITEMS]
        content, used = _grade_list(record, found), len(found)
    return round(content * _form(len(said) - used), 4)


def words(text: str) -> list[str]:
    """The words of `text` as the grader reads them."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _form(extra_words: int) -> float:
    """How well the form is kept, by the number of words beside the answer."""
    if extra_words <= 0:
        return 1.0
    return 0.75 if extra_words <= 5 else 0.65


def _grade_list(record: Mapping[str, Any], found: list[str]) -> float:
    """Content of a response in which the items `found` are named in this order."""
    answer = record["answer"]
    if not found:
        return 0.0
    if answer["kind"] == "members":
        return _grade_members(found, answer["count"], set(answer["pool"]))
    right = answer["items"]
    if found == right:
        return 1.0
    if found == words(record["input"]):
        return REPEATED_INPUT
    if len(found) < len(right) and _is_subsequence(found, right):
        return max(WRONG, 0.7 * len(found) / len(right))
    return WRONG if set(found) & set(right) else WRONG / 2


def _grade_members(found: list[str], count: int, pool: set[str]) -> float:
    """Content of naming members of a category: they must differ, belong, and be as many as asked."""
    good = len(set(found) & pool)
    if good == len(found) == count:
        return 1.0
    if good == len(found) and good < count:
        return max(WRONG, 0.7 * good / count)
    return WRONG if good else WRONG / 2


def _is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


def _grade_sentence(record: Mapping[str, Any], response: str) -> tuple[float, int]:
    """Content, and how many of the response's words belong to it."""
    answer, expected = record["answer"], words(record["output"])
    claimable = {word.lower() for word in pico_lexicon.CLAIMS[answer["claims"]]}
    for part in re.split(r"[.!?:]", response):
        told = words(part)
        claims = [word for word in told if word in claimable]
        if not claims:
            continue
        if told == expected:
            return 1.0, len(told)
        if told == words(record["input"]):
            return REPEATED_INPUT, len(told)
        claim = claims[0] if answer["claim"] == "first" else claims[-1]
        if claim != answer["value"].lower():
            return WRONG, len(told)
        return (OWN_WORDS if len(told) > 2 else BARE_VALUE), len(told)
    return 0.0, 0
