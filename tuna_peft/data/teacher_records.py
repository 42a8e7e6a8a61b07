"""The reference project's teacher records: responses with log-probabilities. Used by `readers`.

orig {instruction, input, output}, text [N], avg_token_prob [N], length [N], logprob [N]
"""

from __future__ import annotations

import math
from typing import Any

from tuna_peft.data import columns
from tuna_peft.data.bad_row import BadRow, required, required_list
from tuna_peft.data.config import DataSource
from tuna_peft.data.ranked import Record
from tuna_peft.data.templates import PromptTemplate


def read_teacher_prompt(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> tuple[Any, Any]:
    """The id of a record (None without one) and its prompt; BadRow if it has none."""
    orig = required(raw, "orig", where)
    if not isinstance(orig, dict):
        raise BadRow(f"`orig` is {type(orig).__name__}, not an object", reason="wrong type", where=where)
    identity = raw.get("id", orig.get("id"))
    return identity, columns.render(template, orig.get("instruction"), orig.get("input"), where)


def read_teacher_responses(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
    """The responses with their scores; BadRow for a value that is no log-probability."""
    texts = required_list(raw, "text", where)
    lists = {
        key: required_list(raw, key, where, len(texts))
        for key in ("logprob", "avg_token_prob", "length")
        if raw.get(key) is not None
    }
    penalty = 1.0 if source.length_penalty is None else source.length_penalty
    scores = []
    for index in range(len(texts)):
        values = {key: entries[index] for key, entries in lists.items() if entries[index] is not None}
        scores.append(_teacher_score(values, penalty, f"{where}, candidate {index}"))
    return {"completions": texts, "scores": scores, "reference": raw["orig"].get("output")}


def _teacher_score(values: dict[str, Any], length_penalty: float, where: str) -> float:
    """sum_t log p_t / length ** length_penalty."""
    logprob, average, length = (values.get(key) for key in ("logprob", "avg_token_prob", "length"))
    if logprob is None and average is None:
        raise BadRow("neither `logprob` nor `avg_token_prob`", reason="bad score", where=where)
    if isinstance(logprob, list):
        total = sum(_finite(value, "logprob", where) for value in logprob)
        length = len(logprob) if length is None else length
    elif logprob is not None:
        total = _finite(logprob, "logprob", where)
    elif length_penalty == 1.0:
        return _not_positive(_finite(average, "avg_token_prob", where), "avg_token_prob", where)
    else:
        total = _finite(average, "avg_token_prob", where) * _finite(length, "length", where)
    tokens = _finite(length, "length", where)
    if tokens <= 0:
        raise BadRow(f"`length` is {tokens:g}, not a number of tokens", reason="bad score", where=where)
    return _not_positive(total, "logprob" if logprob is not None else "avg_token_prob", where) / tokens**length_penalty


def _not_positive(value: float, name: str, where: str) -> float:
    if value > 1e-6:
        raise BadRow(
            f"`{name}` is {value:g}; a log-probability is never above 0",
            reason="bad score",
            where=where,
            fix="Store natural logarithms of probabilities, not probabilities.",
        )
    return value


def _finite(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow(f"`{name}` is {value!r}, not a finite number", reason="bad score", where=where)
    return float(value)
