"""Rows of the result file: which run is an arm's, and which arms lead. Neither torch nor a model is needed.

A row with `what: validation` is a trained run, one with `what: held-out` its measurement; the base has no `rate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.superni.arms import ARMS
from benchmarks.superni.sizes import Sizes

Row = dict[str, Any]


def macro(scores: dict[str, list[list[float]]], metric: int = 0) -> float:
    """The mean of the tasks' means; metrics as in `measures.Scores`."""
    return fmean(fmean(one[metric] for one in of_task) for of_task in scores.values())


def best_rate(rows: Sequence[Row], arm: str) -> float:
    """The arm's learning rate with the best ROUGE-L on validation, by seed 0."""
    tried = [row for row in rows if row["what"] == "validation" and row["arm"] == arm and row["seed"] == 0]
    return max(tried, key=lambda row: macro(row["scores"]))["rate"]


def next_rate(rows: Sequence[Row], arm: str, sizes: Sizes) -> float | None:
    """The next rate to try: the grid's, then once what extends it where the best is at its end; None at the end."""
    tried = {row["rate"] for row in rows if row["what"] == "validation" and row["arm"] == arm and row["seed"] == 0}
    for rate in sizes.rates:
        if rate not in tried:
            return rate
    if tried - set(sizes.rates):
        return None
    best = best_rate(rows, arm)
    return {sizes.rates[-1]: sizes.higher, sizes.rates[0]: sizes.lower}.get(best)


def held_out(rows: Sequence[Row], arm: str) -> list[Row]:
    """The arm's measurements at its best rate, by seed."""
    found = [row for row in rows if row["what"] == "held-out" and row["arm"] == arm]
    if found and found[0]["rate"] is not None:
        rate = best_rate(rows, arm)
        found = [row for row in found if row["rate"] == rate]
    return sorted(found, key=lambda row: row["seed"])


def leader(rows: Sequence[Row]) -> str | None:
    """The deciding arm that ranks and is best on validation; None while one of them has no run."""
    names = [name for name, arm in ARMS.items() if arm.decides and arm.ranks]
    best = {
        name: max(
            (macro(row["scores"]) for row in rows if row["what"] == "validation" and row["arm"] == name), default=None
        )
        for name in names
    }
    if None in best.values():
        return None
    return max(best, key=lambda name: best[name] or 0.0)
