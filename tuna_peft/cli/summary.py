"""The summary at the end of `tuna-peft run`: a table of results, and the next commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuna_peft.evaluation.report.checks import problems
from tuna_peft.evaluation.report.table import Cell, stage_table


def run_summary(report: dict[str, Any], folder: Path) -> RenderableType:
    """The held-out results of the base and of every stage, and the commands that a user may want next.

    Args:
        report: As `run_recipe` returns it.
        folder: The run's folder.
    """
    said = [Text(f"- {problem}", style="yellow") for problem in problems(report)]
    return Group(_table(report), *said, Text(), *_next_commands(report, folder))


# Colors for significant changes from the stage before.
_STYLES = {"better": "green", "worse": "red"}


def _table(report: dict[str, Any]) -> Table:
    headings, rows = stage_table(report)
    measured = ": on held-out data" if any(report["evaluation"].values()) else ""
    # Without lines, four stages with their intervals fit into 80 columns; the intervals of more are wrapped.
    table = Table("after", title=f"{report['name']}{measured}", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for stage, _ in rows:
        table.add_column(stage, justify="right", overflow="fold", no_wrap=len(rows) <= 4)
    for heading, cells in zip(headings, zip(*(cells for _, cells in rows), strict=True), strict=True):
        table.add_row(heading, *map(_shown, cells))
    return table


def _shown(cell: Cell) -> Text:
    text = Text(cell.text or "-", style=_STYLES.get(cell.verdict, ""))
    return text.append(f"\n{cell.interval}", style="dim") if cell.interval else text


def _next_commands(report: dict[str, Any], folder: Path) -> list[Text]:
    base = report["base"]["model"]
    run = shlex.quote(str(folder))
    talk = [f"tuna-peft chat {run}", f"tuna-peft generate {run} 'Your instruction'"]
    if any(report["evaluation"].values()):
        talk.append(f"tuna-peft compare {shlex.quote(f'{folder}@base')} {run}")
    commands = [("Talk to the model, ask it once, compare it with the base:", "\n  ".join(talk))]
    if (folder / "merged").is_dir():
        path = json.dumps(str(folder / "merged"))
        commands.append(("Load the merged model with transformers:", f"AutoModelForCausalLM.from_pretrained({path})"))
    if (folder / "combined").is_dir():
        path = json.dumps(str(folder / "combined"))
        commands.append((f"Load the adapter on {base} with PEFT:", f"PeftModel.from_pretrained(model, {path})"))
    commands.append(("Report (the same numbers are in report.json):", str(folder / "report.html")))
    lines = []
    for what, command in commands:
        lines += [Text(what), Text(f"  {command}", style="bold", no_wrap=True, overflow="ignore")]
    return lines
