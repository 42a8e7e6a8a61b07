"""The contest as a picture: what each arm ranks right, and what its answers are worth."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.contest.arms import ARMS
from benchmarks.contest.table import finals

_MARKS = {"steps": "o", "compute": "s"}


def save_figure(records: list[dict[str, Any]], path: Path) -> None:
    """Means over seeds, with one standard deviation each way; circles at equal steps, squares at equal compute."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "learning"  # the same file from the same runs
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    start = finals(records, "none")["start"][0]
    axes.plot(start["ranking_accuracy"], start["response_score"], "k*", markersize=12)
    _name(axes, "the common start", start["ranking_accuracy"], start["response_score"])
    for budget, mark in _MARKS.items():
        for arm, runs in finals(records, budget).items():
            x, y = ([run[key] for run in runs] for key in ("ranking_accuracy", "response_score"))
            axes.errorbar(
                statistics.mean(x), statistics.mean(y), _deviation(y), _deviation(x), fmt=mark, markersize=6,
                color="#0f6e84" if ARMS[arm].ours else "#d9722a", elinewidth=1, alpha=0.85,
            )  # fmt: skip
            _name(axes, arm, statistics.mean(x), statistics.mean(y))
    axes.set(xlabel="ranking accuracy on held-out lists", ylabel="score of responses to held-out prompts")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _name(axes: Any, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8, color="#444")


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
