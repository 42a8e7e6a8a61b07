"""The table of a contest's runs."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.contest.ablation import ABLATIONS
from benchmarks.contest.arms import ARMS

Record = dict[str, Any]

_TITLES = {"steps": "Same optimiser steps", "compute": "Same compute", "stages": "Stages"}


def chosen_rate(records: list[Record], budget: str, arm: str) -> float:
    """The learning rate with the best mean of ranking accuracy and response score on validation."""
    tried = [r for r in records if r.get("budget") == budget and r.get("arm") == arm and r["split"] == "validation"]
    return max(tried, key=lambda r: r["ranking_accuracy"] + r.get("response_score", 0))["learning_rate"]


def finals(records: list[Record], budget: str) -> dict[str, list[Record]]:
    """The test runs of each arm at its chosen rate, the best mean first: of response scores where there are any."""
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        if record.get("budget") == budget and record["split"] == "test" and _is_chosen(records, record):
            by_arm.setdefault(record["arm"], []).append(record)

    def mean(runs: list[Record]) -> float:
        return statistics.mean(run.get("response_score", run["ranking_accuracy"]) for run in runs)

    return dict(sorted(by_arm.items(), key=lambda item: -mean(item[1])))


def _is_chosen(records: list[Record], record: Record) -> bool:
    if "learning_rate" not in record:
        return True
    return record["learning_rate"] == chosen_rate(records, record["budget"], record["arm"])


def spread(values: list[float]) -> str:
    """Mean and standard deviation over runs."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def markdown(records: list[Record], budget: str) -> str:
    """The finals of a budget as a Markdown table."""
    lines = ["| | ranking accuracy | response score | words | steps | TFLOP | rate | runs |", "|---|" + "---:|" * 7]
    for arm, runs in {**finals(records, "none"), **finals(records, budget)}.items():
        first = runs[0]
        cells = [
            _label(arm),
            spread([r["ranking_accuracy"] for r in runs]),
            spread([r["response_score"] for r in runs]) if "response_score" in first else "",
            f"{statistics.mean(r['words'] for r in runs):.1f}" if "words" in first else "",
            str(first["steps"]),
            f"{first['flops'] / 1e12:.2f}" if "flops" in first else "",
            f"{first['learning_rate']:g}" if "learning_rate" in first else "",
            str(len(runs)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _label(arm: str) -> str:
    if arm in ABLATIONS:
        return ABLATIONS[arm].label
    if arm not in ARMS:
        return "the common start"
    return f"**{ARMS[arm].label}**" if ARMS[arm].ours else ARMS[arm].label


def print_table(records: list[Record]) -> None:
    """What there is, by budget."""
    for budget, title in _TITLES.items():
        if finals(records, budget):
            print(f"\n{title}\n\n{markdown(records, budget)}")
