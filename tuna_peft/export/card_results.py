"""The evaluation part of a model card: tables for people, `model-index` for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from tuna_peft.export.markdown import table
from tuna_peft.export.release import Release, is_on_hub


@dataclass(frozen=True)
class Measured:
    """One metric of one task after one stage."""

    task: str
    metric: str
    main: bool
    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else "")


def measured(release: Release, stage: str) -> list[Measured]:
    """The metrics after a stage (`base`: before the first); empty where the run's report has none."""
    tasks = release.report.get("evaluation", {}).get(stage) or {}
    return [metric for task, result in tasks.items() for metric in _metrics(task, result)]


def _metrics(task: str, result: Any) -> Iterator[Measured]:
    if not isinstance(result, dict):
        return
    for name, entry in result.get("metrics", {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("value"), int | float):
            low, high = entry.get("low"), entry.get("high")
            interval = (low, high) if isinstance(low, int | float) and isinstance(high, int | float) else None
            yield Measured(task, name, name == result.get("main"), float(entry["value"]), interval)


def evaluation_tables(release: Release) -> str | None:
    """The main metric of each task after each stage, and all others before and after; None without results."""
    stages = ["base", *release.stages]
    after = {stage: {(m.task, m.metric): m for m in measured(release, stage)} for stage in stages}
    if not any(after.values()):
        return None
    rows = [
        {"after": f"`{stage}`", **{f"{m.task}: {m.metric}": str(m) for m in found.values() if m.main}}
        for stage, found in after.items()
        if found
    ]
    text = table(rows) + "\n\nIn brackets: the interval over the prompts, where the run computed one."
    left_out = [
        f"- {task}: {left['count']:,}, {left['reason']}"
        for task, result in (release.report["evaluation"].get(stages[-1]) or {}).items()
        if isinstance(result, dict)
        for left in result.get("excluded", ())
    ]
    if left_out:
        text += "\n\nLeft out of the last stage's scores:\n\n" + "\n".join(left_out)
    last = after[stages[-1]]
    details = [
        {"metric": f"{m.task}: {m.metric}", "base": str(after["base"].get(key, "")), f"after {stages[-1]}": str(m)}
        for key, m in last.items()
        if not m.main
    ]
    if details:
        text += f"\n\n<details><summary>All metrics</summary>\n\n{table(details)}\n\n</details>"
    return text


def eval_results(release: Release) -> list[EvalResult]:
    """The results after the last stage, for the metadata's `model-index`."""
    tasks = ((release.recipe or {}).get("evaluation") or {}).get("tasks") or {}
    found = []
    for m in measured(release, release.stages[-1]) if release.stages else []:
        settings = tasks.get(m.task)
        path = settings.get("path") if isinstance(settings, dict) else None
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=path if path and is_on_hub(path) else m.task,
                dataset_name=path or m.task,
                metric_type=m.metric,
                metric_name=f"{m.task}: {m.metric}",
                metric_value=round(m.value, 6),
            )
        )
    return found
