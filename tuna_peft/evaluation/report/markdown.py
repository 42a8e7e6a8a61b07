"""`report.md`: the table of stages, what changed, and some responses, for a model card."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from tuna_peft.evaluation.report.table import heading_of, stage_table, tasks_of

SHOWN = 3


def render_markdown(report: dict[str, Any]) -> str:
    """The report in brief; headings start at level 2."""
    headings, rows = stage_table(report)
    lines = ["## Evaluation", "", _row(["after", *headings]), _row(["---", *["---:"] * len(headings)])]
    for stage, cells in rows:
        texts = [f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in cells]
        lines.append(_row([stage, *texts]))
    lines += ["", "In brackets: 95 % intervals, bootstrap over prompts."]
    if left_out := _left_out(report):
        lines += ["", "Left out of the scores:", "", *left_out]
    if report["samples"]:
        lines += ["", "## The same prompts after each stage" if len(rows) > 1 else "## Responses"]
    for sample in report["samples"][:SHOWN]:
        lines += ["", _quote(sample["prompt"]), ""]
        lines += [f"- {stage}: {_inline(said['text'])}" for stage, said in sample["responses"].items()]
    packages = ", ".join(f"{name} {version}" for name, version in report["environment"]["packages"].items())
    seed = "" if report["seed"] is None else f"; seed {report['seed']}"
    lines += ["", "## Environment", "", f"{packages}{seed}."]
    return "\n".join(lines) + "\n"


def _left_out(report: dict[str, Any]) -> list[str]:
    """What the scores of a task do not hold, in the last stage that was measured by it."""
    last = {task: result for results in report["evaluation"].values() for task, result in results.items()}
    return [
        f"- {heading_of(report, task)}: {left['count']:,}, {_escaped(left['reason'])}"
        for task in tasks_of(report)
        for left in last[task]["excluded"]
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _quote(text: str) -> str:
    return "\n".join(f"> {_escaped(line)}".rstrip() for line in text.strip().splitlines())


def _inline(text: str) -> str:
    """In one line, marked as the model's own words."""
    return f"*{_escaped(' '.join(text.split()))}*" if text.strip() else "(nothing)"


def _escaped(text: str) -> str:
    """Neither Markdown nor HTML: a response must not make headings, links or tags in a card."""
    return re.sub(r"([\\`*_{}\[\]#|!~])", r"\\\1", escape(text, quote=False))
