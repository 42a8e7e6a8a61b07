"""The summary at the end of `tuna-peft run`: a table of results, and the next commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuna_peft.evaluation.report.checks import problems
from tuna_peft.evaluation.report.table import Cell, stage_table
from tuna_peft.export.loading import BASE, ON_UNQUANTIZED, mean_kl, ways_to_load


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
    run = shlex.quote(str(folder))
    talk = [f"tuna-peft chat {run}", f"tuna-peft generate {run} 'Your instruction'"]
    if any(report["evaluation"].values()):
        talk.append(f"tuna-peft compare {shlex.quote(f'{folder}@base')} {run}")
    lines = _command("Talk to the model, ask it once, compare it with the base:", "\n  ".join(talk))
    exports = report["exports"]
    for index, way in enumerate(ways_to_load(folder, exports)):
        measured = "not measured" if way.kl is None else f"KL divergence from the trained adapters {way.kl:.1e} nats"
        nearest = "nearest, " if index == 0 and way.kl is not None else ""
        lines += _command(f"Load {way.what} ({nearest}{measured}):", way.code)
    if (kl := mean_kl(exports, ON_UNQUANTIZED)) is not None:
        scale = "" if (base := mean_kl(exports, BASE)) is None else f"; training changed the base by {base:.1e}"
        what = f"{kl:.1e} nats away{scale}"
        lines.append(Text(f"Programs that do not quantize the base get another model from the adapter: {what}."))
    return lines + _command("Report (the same numbers are in report.json):", str(folder / "report.html"))


def _command(what: str, command: str) -> list[Text]:
    return [Text(what), Text(f"  {command}", style="bold", no_wrap=True, overflow="ignore")]
