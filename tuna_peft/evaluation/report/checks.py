"""What to look at in a run: each quantity with its healthy range, and a sentence where it is outside.

The page shows all of them and the command line the sentences; `docs/reading-a-run.md` explains them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuna_peft.evaluation.report.table import after, heading_of, losses_of, margin_of, metric_cell, tasks_of, verdict

Report = dict[str, Any]

FEW = 100
"""With fewer prompts than this, a change whose interval contains 0 is put down to their number."""

_SHORTER = 0.5  # of the length before
_LENGTH_BIAS = 0.15  # more often than the longer response is better


@dataclass(frozen=True)
class Check:
    """One quantity of a run.

    Attributes:
        name: What is looked at.
        value: Its value, as text.
        healthy: Its healthy range.
        problem: What is wrong and what to do, as sentences; empty if the value is healthy.
    """

    name: str
    value: str
    healthy: str
    problem: str = ""


def checks(report: Report) -> list[Check]:
    """The losses of each stage, the change of each main metric, and accuracy, margin and lengths at the end."""
    return [*_losses(report), *_changes(report), *_ranking(report), *_answers(report)]


def problems(report: Report) -> list[str]:
    """The sentences of all checks that found something."""
    return [check.problem for check in checks(report) if check.problem]


def _losses(report: Report) -> Iterator[Check]:
    for stage, summary in report["stages"].items():
        if (losses := losses_of(report, stage)) is None:
            continue
        first, last = losses
        # One logged loss is noisy: where held-out results rose, it says nothing that it did not fall.
        rose = any(verdict(change) == "better" for change in report["changes"].get(stage, {}).values())
        problem = ""
        if not math.isfinite(last):
            problem = f"The loss of {stage} is not finite. Lower the learning rate."
        elif last >= first and not rose:
            steps = (summary or {}).get("steps")
            during = f" in {steps:,} steps" if steps else ""
            problem = f"The loss of {stage} did not fall ({first:.3f} to {last:.3f}{during}). "
            problem += "Train longer, or change the learning rate."
        yield Check(f"loss of {stage}", f"{first:.3f} to {last:.3f}", "falls, and ends flat", problem)


def _changes(report: Report) -> Iterator[Check]:
    """The change of each task's main metric in each stage; lengths of answers are no quality."""
    for stage, by_task in report["changes"].items():
        for task, change in by_task.items():
            name, count = heading_of(report, task), change["count"]
            by = f"{change['value']:+.3f}, 95 % interval {change['low']:+.3f} to {change['high']:+.3f}"
            problem = ""
            if verdict(change) == "worse":
                problem = f"{stage} made the {name} worse than after {change['against']} ({by})."
            elif verdict(change) == "unclear" and count < FEW:
                problem = f"{count} prompts are too few to tell whether {stage} changed the {name} ({by})."
            yield Check(f"{name}: change by {stage}", by, "interval above 0", problem)


def _ranking(report: Report) -> Iterator[Check]:
    stages = [stage for stage, results in report["evaluation"].items() if "ranking" in results]
    if not stages:
        return
    last = stages[-1]
    result = report["evaluation"][last]["ranking"]
    accuracy = result["metrics"][result["main"]]
    if accuracy["value"] is not None:
        cell, problem = metric_cell(accuracy), ""
        shown = f"{cell.text} ({cell.interval})" if cell.interval else cell.text
        if accuracy["high"] is not None and accuracy["high"] < 0.5:
            problem = f"The ranking accuracy {_after(last)} is below chance: {shown}. Are higher scores better?"
        elif accuracy["low"] is not None and accuracy["low"] <= 0.5:
            problem = f"The ranking accuracy {_after(last)} is no better than chance (0.5): {shown}."
        yield Check("ranking accuracy at the end", shown, "interval above 0.5", problem)
    if margin := margin_of(report, last):
        problem = ""
        if margin["value"] <= 0:
            problem = f"{_after(last).capitalize()}, worse responses are on average as likely as better ones."
        yield Check("margin at the end", metric_cell(margin).text, "above 0, growing from stage to stage", problem)
    prefers, given = (result["metrics"].get(name) for name in ("prefers_longer", "better_is_longer"))
    if prefers and given and None not in (prefers["value"], given["value"]):
        problem = ""
        if prefers["value"] - given["value"] > _LENGTH_BIAS:
            problem = (
                f"The model prefers the longer response in {prefers['value']:.0%} of pairs; it is the better one in "
                f"{given['value']:.0%}."
            )
        healthy = f"near {given['value']:.2f}, how often it is better"
        yield Check("how often the longer response is preferred", f"{prefers['value']:.2f}", healthy, problem)


def _answers(report: Report) -> Iterator[Check]:
    for task in tasks_of(report):
        lengths = {
            stage: results[task]["answer_length"]
            for stage, results in report["evaluation"].items()
            if results.get(task, {}).get("answer_length")
        }
        if len(lengths) < 2:
            continue
        (first, before), *_, (last, now) = lengths.items()
        problem = ""
        if now < _SHORTER * before:
            problem = (
                f"The answers became much shorter: {before:.0f} characters {_after(first)}, {now:.0f} {_after(last)} "
                f"(task {task}). Are short responses ranked best?"
            )
        name = "length of the answers, characters" + ("" if task == "answers" else f" ({task})")
        yield Check(name, f"{before:.0f} to {now:.0f}", f"above {_SHORTER * before:.0f}", problem)


def _after(stage: str) -> str:
    return "of the base" if stage == "base" else after(stage)
