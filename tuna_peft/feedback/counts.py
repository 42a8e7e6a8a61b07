"""What the reports of sampling, scoring and judging have in common: the skipped rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Counts:
    """Base of `SampleReport`, `ScoreReport` and `JudgeReport`.

    Args:
        left_out: Number of skipped rows, by reason.
    """

    left_out: dict[str, int] = field(default_factory=dict)

    def count_skipped(self, reason: str) -> None:
        """Counts a row that is skipped."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def reasons(self) -> str:
        """`reason: count, ...`, for errors."""
        return ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return asdict(self)
