"""What every teacher gives: responses with log-probabilities, counted, as records of the ranked type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.data.ranked import BadRow, Record, normalise
from tuna_peft.data.tokenize import encode_ranked
from tuna_peft.errors import UserError


@dataclass
class ScoreReport:
    """What became of the rows.

    Args:
        rows: Rows given.
        scored: Rows with scores that have a pair.
        left_out: Number of the others, by reason.
        responses: Responses scored.
        tokens: Their tokens, in the teacher's count.
        found: Answers that the journal had.
        asked: Answers that were made now.
        cut: Responses of a generating server that did not end by themselves.
        cost: Of a server's answers, those found included; 0 without prices.
    """

    rows: int = 0
    scored: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    responses: int = 0
    tokens: int = 0
    found: int = 0
    asked: int = 0
    cut: int = 0
    cost: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return asdict(self)

    def leave_out(self, reason: str) -> None:
        """Counts a row that is left out."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def lines(self) -> list[str]:
        """What a user wants to know of it."""
        lines = [f"left out: {count:,} rows ({reason})" for reason, count in self.left_out.items()]
        lines += [f"cut at the longest length: {self.cut:,} responses"] if self.cut else []
        lines += [f"cost: {self.cost:.4f}"] if self.cost else []
        return lines


@dataclass(frozen=True)
class Scored:
    """The responses of one prompt under a teacher.

    Args:
        completions: The responses.
        logprobs: Their summed log-probabilities, nats.
        lengths: Their tokens, in the teacher's count.
    """

    completions: Sequence[str]
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
        answers: None where a row is left out, which is counted already.
        length_penalty: beta of v = sum / length ** beta (equation 2 of the paper).
        teacher: Name and revision, as they stand in each record.
        report: Is added to.

    Returns:
        `id`, `prompt`, `completions`, `scores`, `ranks`, `reference`, and beside them `logprobs`, `lengths`,
        `length_penalty` and `teacher`.

    Raises:
        UserError: No row is left.
    """
    records = []
    for row, answer in zip(rows, answers, strict=True):
        if answer is None:
            continue
        pairs = list(zip(answer.logprobs, answer.lengths, strict=True))
        scores = [total / length**length_penalty for total, length in pairs]
        ranked = {key: row.get(key) for key in ("id", "prompt", "reference")}
        try:
            record = normalise(
                {**ranked, "completions": answer.completions, "scores": scores}, f"prompt {row.get('id')}"
            ).record
        except BadRow as error:
            report.leave_out(error.reason)
            continue
        of = {text: pair for text, pair in reversed(list(zip(answer.completions, pairs, strict=True)))}
        record["logprobs"] = [of[text][0] for text in record["completions"]]
        record["lengths"] = [of[text][1] for text in record["completions"]]
        records.append({**record, "length_penalty": length_penalty, "teacher": teacher})
        report.responses += len(record["completions"])
        report.tokens += sum(record["lengths"])
    report.rows, report.scored = len(rows), len(records)
    if not records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.left_out.items())
        raise UserError(
            f"the teacher ranks none of {len(rows)} prompts ({reasons})",
            fix="Each needs two different responses whose scores differ.",
        )
    return records


def encode_in_order(row: Record, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Any]:
    """The tokens of a row whose completions have no ranks, in their order; see `encode_ranked`.

    Raises:
        BadRow: It is longer than `max_length`.
    """
    record = {**row, "reference": None, "scores": None, "ranks": list(range(len(row["completions"])))}
    encoded = encode_ranked(record, tokenizer, max_length=max_length, where=f"prompt {row.get('id')}")
    assert encoded is not None, "nothing is skipped"
    return encoded


def is_logprob(value: Any) -> bool:
    """A finite number that can be a log-probability (rounding may lift it a little above 0)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-6
