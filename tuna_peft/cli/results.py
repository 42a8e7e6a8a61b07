"""Results of an evaluation as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuna_peft.evaluation.results import TITLES, Metric, TaskResult


def results_tables(results: dict[str, dict[str, TaskResult]]) -> RenderableType:
    """One table for each task, stages as columns, and below it what was left out."""
    parts: list[RenderableType] = []
    for task in dict.fromkeys(task for of_stage in results.values() for task in of_stage):
        by_stage = {stage: of_stage[task] for stage, of_stage in results.items() if task in of_stage}
        table = Table(task, *by_stage, title=TITLES.get(task, task))
        table.columns[0].no_wrap = True
        names = dict.fromkeys(name for result in by_stage.values() for name in result.metrics)
        for name in names:
            row = [str(result.metrics.get(name, Metric(None))) for result in by_stage.values()]
            main = any(result.main == name for result in by_stage.values())
            table.add_row(name, *row, style="bold" if main else None)
        parts += [table, *_left_out(by_stage)]
    return Group(*parts)


def _left_out(by_stage: dict[str, TaskResult]) -> list[Text]:
    stages_by_line: dict[str, list[str]] = {}
    for stage, result in by_stage.items():
        for one in result.excluded:
            names = ", ".join(one.names[:5]) + (", ..." if one.count > 5 else "")
            stages_by_line.setdefault(f"{one.count} left out, {one.reason}: {names}", []).append(stage)
    return [
        Text(line if len(stages) == len(by_stage) else f"{', '.join(stages)}: {line}", style="yellow")
        for line, stages in stages_by_line.items()
    ]
