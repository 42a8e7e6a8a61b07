"""Comparisons of arms and their verdicts, by the rules of `docs/experiments/smollm2-superni.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.superni.arms import ARMS, BASE, RAFT
from benchmarks.superni.rows import Row, held_out

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
EQUAL = 2.0
"""Points: an interval within this on both sides of zero is no difference."""

ROUGE, EXACT, WORDS, ENDED = range(4)


@dataclass(frozen=True)
class Estimate:
    """A mean of the tasks' means with its interval, by a bootstrap over tasks.

    Attributes:
        value, low, high: With 95 % percentiles.
        p: Two-sided: twice the smaller share of resamples on either side of zero.
        tasks, instances: What it is a mean over.
    """

    value: float
    low: float
    high: float
    p: float
    tasks: int
    instances: int

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def signed(self) -> str:
        """As a difference: `+1.0 [-0.5, 2.5]`."""
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `against` on a split.

    Attributes:
        difference: Of ROUGE-L, paired by instance.
        p: Corrected by Holm's method within its family.
        verdict: win, loss, no difference or undecided.
    """

    arm: str
    against: str
    difference: Estimate
    p: float
    verdict: str


def instances(rows: Sequence[Row], split: str, metric: int) -> dict[str, np.ndarray]:
    """By task, the metric of each instance: its mean over the rows, which are an arm's seeds."""
    return {
        task: np.mean([[one[metric] for one in row[split][task]] for row in rows], axis=0) for task in rows[0][split]
    }


def estimate(by_task: dict[str, np.ndarray]) -> Estimate:
    """The mean of the tasks' means; resamples hold whole tasks."""
    means = np.array([values.mean() for values in by_task.values()])
    count = len(means)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    resampled = draws @ means / count
    low, high = np.percentile(resampled, [2.5, 97.5])
    # A resample at zero counts on both sides: without any difference p is 1.
    p = min(1.0, 2 * min((resampled <= 0).mean(), (resampled >= 0).mean()))
    total = sum(len(values) for values in by_task.values())
    return Estimate(float(means.mean()), float(low), float(high), max(p, 1 / RESAMPLES), count, total)


def difference(arm: Sequence[Row], against: Sequence[Row], split: str, metric: int = ROUGE) -> Estimate:
    """Paired by instance.

    Raises:
        ValueError: The two were measured on different tasks or instances.
    """
    one, other = (instances(rows, split, metric) for rows in (arm, against))
    if {task: len(values) for task, values in one.items()} != {task: len(values) for task, values in other.items()}:
        raise ValueError(f"{split}: the arms were measured on different instances")
    return estimate({task: values - other[task] for task, values in one.items()})


def holm(ps: Sequence[float]) -> list[float]:
    """Corrected p-values (Holm 1979), in the order given."""
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def verdict(found: Estimate, p: float) -> str:
    """The protocol's verdict on a difference with its corrected p."""
    if p < SIGNIFICANCE:
        return "win" if found.value > 0 else "loss"
    return "no difference" if found.low >= -EQUAL and found.high <= EQUAL else "undecided"


def primary_pairs() -> list[tuple[str, str]]:
    """The arms of the primary family, each with what it is compared with."""
    return [(RAFT, BASE), *((name, RAFT) for name, arm in ARMS.items() if arm.decides and name != RAFT)]


def compare(rows: Sequence[Row], split: str, *, primary: bool) -> list[Comparison]:
    """The comparisons of one family between arms that have been measured.

    A primary comparison that is not there yet still counts in the correction: the family is fixed.
    """
    measured = {name: held_out(rows, name) for name in (BASE, *ARMS)}
    family = primary_pairs()
    if not primary:
        family = [
            (name, against)
            for name, arm in ARMS.items()
            for against in (BASE, RAFT, *arm.also_against)
            if name != against and (name, against) not in family
        ]
    pairs = [(arm, against) for arm, against in family if measured[arm] and measured[against]]
    found = [difference(measured[arm], measured[against], split) for arm, against in pairs]
    missing = [1.0] * (len(family) - len(pairs)) if primary else []
    corrected = holm([each.p for each in found] + missing)
    return [
        Comparison(arm, against, each, p, verdict(each, p))
        for (arm, against), each, p in zip(pairs, found, corrected, strict=False)
    ]


def by_seed(rows: Sequence[Row], arm: str, split: str) -> list[float]:
    """ROUGE-L of each seed."""
    return [estimate(instances([row], split, ROUGE)).value for row in held_out(rows, arm)]


def values(rows: Sequence[Row], arm: str, key: str) -> Any:
    """The mean over seeds of a measure that is a number or starts with its value; None if it was not measured."""
    found = [
        row[key][0] if isinstance(row[key], list) else row[key]
        for row in held_out(rows, arm)
        if row.get(key) is not None
    ]
    return float(np.mean(found)) if found else None
