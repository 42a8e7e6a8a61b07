"""The evaluation in a model card: tables for people, `model-index` for the Hub. `card` calls it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult
from markupsafe import Markup

from tuna_peft.export.release import Release, is_on_hub
from tuna_peft.markup import code


@dataclass(frozen=True)
class Measured:
    """One metric of one task after one stage."""

    task: str
    metric: str
    main: bool
    value: float
    interval: tuple[float, float] | None

    def text(self) -> Markup:
        """`0.625 [0.600, 0.650]`."""
        interval = f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
        return Markup(f"{self.value:.3f}{interval}")


def measured(release: Release, stage: str) -> list[Measured]:
    """The metrics after a stage (`base`: before the first); empty where the run's report has none."""
    tasks = release.report.get("evaluation", {}).get(stage) or {}
    # The length of answers is no result.
    return [metric for task, result in tasks.items() if task != "answers" for metric in _metrics(task, result)]


def _metrics(task: str, result: Any) -> Iterator[Measured]:
    if not isinstance(result, dict):
        return
    for name, entry in result.get("metrics", {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("value"), int | float):
            low, high = entry.get("low"), entry.get("high")
            interval = (low, high) if isinstance(low, int | float) and isinstance(high, int | float) else None
            yield Measured(task, name, name == result.get("main"), float(entry["value"]), interval)


def evaluation_tables(release: Release) -> dict[str, list[Any]] | None:
    """The main metrics after each stage (`main`), the `others` before and after all, what is `excluded`; or None."""
    stages = ["base", *release.stages]
    after = {stage: {(m.task, m.metric): m for m in measured(release, stage)} for stage in stages}
    if not any(after.values()):
        return None
    last = stages[-1]
    tasks = release.report["evaluation"].get(last) or {}
    return {
        "main": [
            {"after": code(stage), **{f"{m.task}: {m.metric}": m.text() for m in found.values() if m.main}}
            for stage, found in after.items()
            if found
        ],
        "others": [
            {
                "metric": f"{m.task}: {m.metric}",
                "base": after["base"][key].text() if key in after["base"] else "",
                f"after {last}": m.text(),
            }
            for key, m in after[last].items()
            if not m.main
        ],
        "excluded": [
            (task, left)
            for task, result in tasks.items()
            if isinstance(result, dict)
            for left in result.get("excluded", ())
        ],
    }


def eval_results(release: Release) -> list[EvalResult]:
    """The results after the last stage, for the metadata's `model-index`; none for files that were not evaluated."""
    if release.is_quantized:
        return []
    evaluation = (release.recipe or {}).get("evaluation")
    tasks = (evaluation.get("tasks") or {}) if isinstance(evaluation, dict) else {}  # else it is `auto` or null
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
