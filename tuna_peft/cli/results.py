"""Results of an evaluation as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuna_peft.evaluation.results import TITLES, Metric, TaskResult
from tuna_peft.terminal import console


def results_tables(results: dict[str, dict[str, TaskResult]], width: int) -> RenderableType:
    """One table for each task, and below it the prompts that were skipped.

    Stages are columns if every value with its interval then fits into one line of `width` characters, else rows.
    """
    parts: list[RenderableType] = []
    for task in dict.fromkeys(task for of_stage in results.values() for task in of_stage):
        by_stage = {stage: of_stage[task] for stage, of_stage in results.items() if task in of_stage}
        table = _stages_as_columns(task, by_stage)
        if console(width=10_000).measure(table).maximum > width:
            table = _stages_as_rows(task, by_stage)
        parts += [table, *_left_out(by_stage)]
    return Group(*parts)


def _stages_as_columns(task: str, by_stage: dict[str, TaskResult]) -> Table:
    table = Table(task, *by_stage, title=TITLES.get(task, task))
    for name in _metrics(by_stage):
        table.add_row(name, *_values(by_stage, name), style=_style(by_stage, name))
    return table


def _stages_as_rows(task: str, by_stage: dict[str, TaskResult]) -> Table:
    table = Table(task, "after", "", title=TITLES.get(task, task))
    for column in table.columns:
        column.no_wrap = True
    for name in _metrics(by_stage):
        for row, (stage, value) in enumerate(zip(by_stage, _values(by_stage, name), strict=True)):
            table.add_row("" if row else name, stage, value, style=_style(by_stage, name))
        table.add_section()
    return table


def _metrics(by_stage: dict[str, TaskResult]) -> list[str]:
    return list(dict.fromkeys(name for result in by_stage.values() for name in result.metrics))


def _values(by_stage: dict[str, TaskResult], name: str) -> list[str]:
    return [str(result.metrics.get(name, Metric(None))) for result in by_stage.values()]


def _style(by_stage: dict[str, TaskResult], name: str) -> str | None:
    return "bold" if any(result.main == name for result in by_stage.values()) else None


def _left_out(by_stage: dict[str, TaskResult]) -> list[Text]:
    stages_by_line: dict[str, list[str]] = {}
    for stage, result in by_stage.items():
        for one in result.excluded:
            names = ", ".join(one.names[:5]) + (", ..." if one.count > 5 else "")
            stages_by_line.setdefault(f"{one.count} skipped, {one.reason}: {names}", []).append(stage)
    return [
        Text(line if len(stages) == len(by_stage) else f"{', '.join(stages)}: {line}", style="yellow")
        for line, stages in stages_by_line.items()
    ]
