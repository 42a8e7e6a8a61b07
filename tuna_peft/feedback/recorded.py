"""Probabilistic ranking by log-probabilities that a data set has recorded, as sums or token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.data import columns
from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.ranked import Record, clean_response, response_key
from tuna_peft.errors import UserError
from tuna_peft.feedback.scored import Scored, ScoreReport, encode_in_order, is_logprob, scored_records


def score_recorded(
    rows: Sequence[Record],
    *,
    completions: str,
    logprobs: str,
    lengths: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length_penalty: float = 1.0,
    teacher: str = "recorded",
    skip_bad_rows: bool = False,
) -> tuple[list[Record], ScoreReport]:
    """Ranks the completions of each row by log-probabilities in its record.

    Args:
        rows: `{"id", "prompt", "completions", "record"}`, see `tuna_peft.data.load.load_candidates`.
        completions: Path of the responses in a record, such as `responses[].text` (see `data.config.Columns`).
        logprobs: Path of their log-probabilities (natural logarithms): one sum each, or a list with one per token.
        lengths: Path of their numbers of tokens; not needed where log-probabilities are listed by token.
        tokenizer: The teacher's tokenizer. It counts the tokens of a response (after its prompt, without EOS) where
            neither lists nor `lengths` tell the number.
        length_penalty: score = sum / length ** length_penalty.
        teacher: Name of the teacher in the records.
        skip_bad_rows: Skip and count rows that cannot be used.

    Raises:
        UserError: A value is missing or is not a log-probability, a length is unknown, or no row can be ranked.
    """
    report = ScoreReport()
    answers: list[Scored | None] = []
    for row in rows:
        try:
            answers.append(_scored(row, completions, logprobs, lengths, tokenizer, report))
        except BadRow as error:
            if not skip_bad_rows:
                raise
            report.count_skipped(error.reason)
            answers.append(None)
    name = {"model": teacher, "revision": None}
    return scored_records(rows, answers, length_penalty, name, report), report


def _scored(
    row: Record,
    completions: str,
    logprobs: str,
    lengths: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    report: ScoreReport,
) -> Scored:
    where, raw = f"prompt {row['id']}", row["record"]
    texts, values = columns.many(raw, completions, where), columns.many(raw, logprobs, where)
    counts: list[Any] = [None] * len(texts) if lengths is None else columns.many(raw, lengths, where)
    if not len(texts) == len(values) == len(counts):
        raise BadRow(
            f"{len(texts)} responses, {len(values)} log-probabilities and {len(counts)} lengths",
            reason="different numbers of scores and responses",
            where=where,
        )
    # Identical responses of a row were merged: the values of the first one count.
    given = [clean_response(text, row["prompt"], f"{where}, candidate {place}") for place, text in enumerate(texts)]
    first = {response_key(response): place for place, response in reversed(list(enumerate(given)))}
    places = [first[response_key(response)] for response in row["completions"]]
    sums = [_sum(values[place], f"{where}, candidate {place}") for place in places]
    tokens = [_length(values[place], counts[place], f"{where}, candidate {place}") for place in places]
    if None in tokens:
        if tokenizer is None:
            raise UserError(
                "the numbers of tokens of the responses are unknown",
                where=where,
                fix="Give --lengths, or the teacher's --tokenizer to count them.",
            )
        counted = _counted(row, tokenizer, report)
        tokens = [known or count for known, count in zip(tokens, counted, strict=True)]
    return Scored(row["completions"], sums, [count for count in tokens if count is not None])


def _sum(value: Any, where: str) -> float:
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not is_logprob(part):
            raise BadRow(
                f"{part!r:.40} is not a log-probability",
                reason="bad score",
                where=where,
                fix="Give natural logarithms of probabilities: finite, and never above 0.",
            )
    if not parts:
        raise BadRow("the list of log-probabilities is empty", reason="bad score", where=where)
    return float(sum(parts))


def _length(value: Any, count: Any, where: str) -> int | None:
    if count is None:
        return len(value) if isinstance(value, list) else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadRow(f"the length is {count!r:.40}, not a number of tokens", reason="bad score", where=where)
    return count


def _counted(row: Record, tokenizer: PreTrainedTokenizerBase, report: ScoreReport) -> list[int]:
    """Number of tokens of each completion after its prompt, without EOS."""
    encoded = encode_in_order(row, tokenizer, None, report)
    return [
        len(ids) - skip - 1 for ids, skip in zip(encoded["completions_ids"], encoded["completion_skips"], strict=True)
    ]
