"""Ranked records from responses with log-probabilities, and their counts: the common part of all teachers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import PromptConfig
from tuna_peft.data.encoder import TokenReport
from tuna_peft.data.ranked import Record, Response, normalise, response_key
from tuna_peft.data.tokenize import encode_ranked
from tuna_peft.errors import UserError
from tuna_peft.feedback.counts import Counts

logger = logging.getLogger("tuna_peft")


@dataclass
class ScoreReport(Counts):
    """How many rows were ranked, and what was asked for that.

    Args:
        rows: Number of rows.
        scored: Number of rows with scores in which two responses differ.
        responses: Number of responses scored.
        tokens: Number of their tokens, as the teacher counts them.
        found: Number of answers that the journal had.
        asked: Number of answers computed or asked for now.
        cut: With `generate`: number of responses that were truncated.
        cost: Cost of a server's answers, those of the journal included; 0 without prices.
        changes: Number of responses whose texts the teacher's chat template changed, by what it changed.
    """

    rows: int = 0
    scored: int = 0
    responses: int = 0
    tokens: int = 0
    found: int = 0
    asked: int = 0
    cut: int = 0
    cost: float = 0.0
    changes: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A summary for the terminal."""
        lines = [f"skipped: {count:,} rows ({reason})" for reason, count in self.left_out.items()]
        lines += [f"truncated: {self.cut:,} responses"] if self.cut else []
        lines += [f"cost: {self.cost:.4f}"] if self.cost else []
        return lines


@dataclass(frozen=True)
class Scored:
    """The responses to one prompt with their log-probabilities under a teacher.

    Args:
        completions: The responses.
        logprobs: Sum of the token log-probabilities of each response, in nats.
        lengths: Number of tokens of each response, as the teacher counts them.
    """

    completions: Sequence[Response]
    logprobs: Sequence[float]
    lengths: Sequence[int]


def scored_records(
    rows: Sequence[Record],
    answers: Sequence[Scored | None],
    length_penalty: float,
    teacher: dict[str, Any],
    report: ScoreReport,
) -> list[Record]:
    """Records of the ranked type, best first, in the order of `rows`.

    Args:
        rows: `{"id", "prompt"}`, optional `reference`.
        answers: One for each row; None if the row is skipped, which is counted already.
        length_penalty: beta of v = sum / length ** beta (equation 2 of the paper).
        teacher: Name and revision, which each record gets.
        report: The counts, which are updated.

    Returns:
        Records with `id`, `prompt`, `completions`, `scores`, `ranks`, `reference`, `logprobs`, `lengths`,
        `length_penalty` and `teacher`.

    Raises:
        UserError: No row can be ranked.
    """
    for kind, count in report.changes.items():
        logger.warning("%s, before scoring: %d responses", kind, count)
    records = []
    for row, answer in zip(rows, answers, strict=True):
        if answer is None:
            continue
        pairs = list(zip(answer.logprobs, answer.lengths, strict=True))
        scores = [total / length**length_penalty for total, length in pairs]
        ranked = {key: row.get(key) for key in ("id", "prompt", "reference", "tools")}
        ranked |= {"completions": answer.completions, "scores": scores}
        try:
            record = normalise(ranked, f"prompt {row.get('id')}").record
        except BadRow as error:
            report.count_skipped(error.reason)
            continue
        keys = map(response_key, answer.completions)
        of = {key: pair for key, pair in reversed(list(zip(keys, pairs, strict=True)))}
        record["logprobs"] = [of[response_key(response)][0] for response in record["completions"]]
        record["lengths"] = [of[response_key(response)][1] for response in record["completions"]]
        records.append({**record, "length_penalty": length_penalty, "teacher": teacher})
        report.responses += len(record["completions"])
        report.tokens += sum(record["lengths"])
    report.rows, report.scored = len(rows), len(records)
    if not records:
        raise UserError(
            f"the teacher ranks none of {len(rows)} prompts ({report.reasons()})",
            fix="A prompt needs two different responses whose scores differ.",
        )
    return records


def encode_in_order(
    row: Record, tokenizer: PreTrainedTokenizerBase, max_length: int | None, report: ScoreReport
) -> dict[str, Any]:
    """The tokens of a row whose completions have no ranks, in the given order; see `encode_ranked`.

    Args:
        report: Counts what the teacher's chat template changes in the texts.

    Raises:
        BadRow: The row is longer than `max_length`.
    """
    record = {**row, "reference": None, "scores": None, "ranks": list(range(len(row["completions"])))}
    # The teacher scores what its own template writes; responses with equal tokens keep their places.
    prompt = PromptConfig(rendering="lenient")
    encoded = encode_ranked(
        record, tokenizer, max_length=max_length, prompt=prompt, merge=False, where=f"prompt {row.get('id')}",
        report=TokenReport(changes=report.changes),
    )  # fmt: skip
    assert encoded is not None, "nothing is skipped"
    return encoded


def is_logprob(value: Any) -> bool:
    """Whether `value` can be a log-probability: a finite number, at most 0 (or a little more, by rounding)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-6
