"""The table of stages: metrics, changes and costs of each. The page, `report.md` and the command line show it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tuna_peft.evaluation.results import TITLES, number

# Heading, key in a stage's summary, format.
_COSTS = (
    ("steps", "steps", ",.0f"),
    ("tokens", "tokens", ",.0f"),
    ("seconds", "seconds", ",.0f"),
    ("peak GiB", "peak_memory_gib", ".2f"),
)


@dataclass(frozen=True)
class Cell:
    """A value as text.

    Attributes:
        text: The value.
        interval: Its 95 % interval, or empty.
        change: The difference from the stage before, with a sign, or empty.
        verdict: `better`, `worse` or `unclear` (the interval of the change contains 0); empty without a change.
    """

    text: str = ""
    interval: str = ""
    change: str = ""
    verdict: str = ""


def stage_table(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Headings, and the name and cells of the base and of each stage."""
    evaluation = report["evaluation"]
    tasks = tasks_of(report)
    costs = [
        cost for cost in _COSTS if any((stage or {}).get(cost[1]) is not None for stage in report["stages"].values())
    ]
    margins = {stage: margin for stage in evaluation if (margin := margin_of(report, stage))}
    losses = {stage: loss for stage in evaluation if (loss := losses_of(report, stage))}
    headings = [heading_of(report, task) for task in tasks]
    headings += ["loss, first to last"] * bool(losses) + [heading for heading, _, _ in costs]
    if margins:  # beside the ranking accuracy, the first of the tasks
        headings.insert(1, "margin")
    rows = []
    for stage in evaluation:
        cells = [_measured(report, stage, task) for task in tasks]
        cells += [Cell("{:.3f} to {:.3f}".format(*losses[stage])) if stage in losses else Cell()] * bool(losses)
        if margins:
            cells.insert(1, metric_cell(margins[stage]) if stage in margins else Cell())
        summary = report["stages"].get(stage) or {}
        cells += [
            Cell(format(summary[key], form)) if summary.get(key) is not None else Cell() for _, key, form in costs
        ]
        rows.append((stage, cells))
    return headings, rows


def tasks_of(report: dict[str, Any]) -> list[str]:
    """The tasks with a result for any stage: the built-in ones in their order, then the others."""
    found = dict.fromkeys(task for results in report["evaluation"].values() for task in results)
    return [*(task for task in TITLES if task in found), *(task for task in found if task not in TITLES)]


def margin_of(report: dict[str, Any], stage: str) -> dict[str, Any] | None:
    """The mean margin between two held-out responses after a stage; None in reports of earlier versions."""
    ranking = report["evaluation"][stage].get("ranking", {"metrics": {}})
    margin = ranking["metrics"].get("margin")
    return margin if margin and margin["value"] is not None else None


def losses_of(report: dict[str, Any], stage: str) -> tuple[float, float] | None:
    """The first and the last loss that the trainer logged in a stage; None without a log."""
    points = report["curves"].get(stage, {}).get("loss", {}).get("loss")
    return (points[0][1], points[-1][1]) if points else None


def main_metrics(report: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and stage, the main metric, where it has a value."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks_of(report):
        for stage, results in report["evaluation"].items():
            if task in results and (metric := results[task]["metrics"][results[task]["main"]])["value"] is not None:
                found.setdefault(task, {})[stage] = metric
    return found


def heading_of(report: dict[str, Any], task: str) -> str:
    """The name of the main metric of `task`."""
    main = next(results[task]["main"] for results in report["evaluation"].values() if task in results)
    return TITLES.get(task, f"{task} {main}".replace("_", " "))


def after(stage: str) -> str:
    """`after sft` for the stage `sft`; `base` and `model`, which are no stages, stay as they are."""
    return stage if stage in ("base", "model") else f"after {stage}"


def metric_cell(metric: dict[str, Any]) -> Cell:
    """The value of a metric and its interval, with the same number of decimals."""
    low, high = metric["low"], metric["high"]
    percent = metric.get("percent", False)  # missing in reports of earlier versions
    text = number(metric["value"], among=(low, high), percent=percent)
    if low is None or high is None:
        return Cell(text)
    low, high = (number(one, among=(low, high), percent=percent) for one in (low, high))
    return Cell(text, f"{low} to {high}")


def verdict(change: dict[str, Any]) -> str:
    """`better`, `worse` or `unclear`, by the interval of a change."""
    if change["low"] > 0:
        return "better"
    return "worse" if change["high"] < 0 else "unclear"


def _measured(report: dict[str, Any], stage: str, task: str) -> Cell:
    result = report["evaluation"][stage].get(task)
    if result is None:
        return Cell()
    metric = result["metrics"][result["main"]]
    cell = metric_cell(metric)
    change = report["changes"].get(stage, {}).get(task)
    if change is None:
        return cell
    by = number(change["value"], among=(metric["high"],), sign="+", percent=metric.get("percent", False))
    return replace(cell, change=by, verdict=verdict(change))
