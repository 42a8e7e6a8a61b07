"""`report.md`: the table of stages, what was excluded, and some responses, for a model card. `write` calls it."""

from __future__ import annotations

from typing import Any

from tuna_peft.evaluation.report.checks import problems
from tuna_peft.evaluation.report.table import heading_of, stage_table, tasks_of
from tuna_peft.markup import render


def render_markdown(report: dict[str, Any]) -> str:
    """The report in brief; headings start at level 2."""
    headings, stages = stage_table(report)
    rows = [
        {"after": stage}
        | {
            heading: f"{cell.text} ({cell.interval})" if cell.interval else cell.text
            for heading, cell in zip(headings, cells, strict=True)
        }
        for stage, cells in stages
    ]
    # A task's exclusions in the last stage that was measured by it.
    last = {task: result for results in report["evaluation"].values() for task, result in results.items()}
    excluded = [
        (heading_of(report, task), exclusion) for task in tasks_of(report) for exclusion in last[task]["excluded"]
    ]
    return render(
        "evaluation/report/report.md.jinja", report=report, rows=rows, excluded=excluded, problems=problems(report)
    )
