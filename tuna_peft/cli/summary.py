"""The last thing that `run` prints: the table, and the commands to go on with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuna_peft.evaluation.results import TITLES


def run_summary(report: dict[str, Any], folder: Path) -> RenderableType:
    """The base and every stage with their held-out measures, and what a user would do next.

    Args:
        report: As `run_recipe` returns it.
        folder: The run's folder.
    """
    return Group(_table(report), Text(), *_next_commands(report, folder))


# Of a stage: heading, key, and how it is written.
_COLUMNS = (
    ("steps", "steps", ","),
    ("tokens", "tokens", ","),
    ("seconds", "seconds", ".0f"),
    ("peak GiB", "peak_memory_gib", ".2f"),
)


def _table(report: dict[str, Any]) -> Table:
    table = Table("after", title=f"{report['name']}: on held-out data")
    table.columns[0].no_wrap = True
    evaluation = report["evaluation"]
    columns = {}
    for task in dict.fromkeys(task for tasks in evaluation.values() for task in tasks):
        columns[TITLES.get(task, task)] = ".3f", [_main_value(tasks.get(task)) for tasks in evaluation.values()]
    for heading, key, form in _COLUMNS:
        columns[heading] = form, [(report["stages"].get(stage) or {}).get(key) for stage in evaluation]
    cells = [[stage] for stage in evaluation]
    for heading, (form, values) in columns.items():
        if any(value is not None for value in values):
            table.add_column(heading, justify="right")
            for row, value in zip(cells, values, strict=True):
                row.append("-" if value is None else format(value, form))
    for row in cells:
        table.add_row(*row)
    return table


def _main_value(result: dict[str, Any] | None) -> float | None:
    return None if result is None else result["metrics"][result["main"]]["value"]


def _next_commands(report: dict[str, Any], folder: Path) -> list[Text]:
    base = report["base"]["model"]
    commands = [("Ask it something:", f"tuna-peft generate {shlex.quote(str(folder))} 'Your instruction'")]
    if (folder / "merged").is_dir():
        path = json.dumps(str(folder / "merged"))
        commands.append(("Use the merged model, plain transformers:", f"AutoModelForCausalLM.from_pretrained({path})"))
    if (folder / "combined").is_dir():
        path = json.dumps(str(folder / "combined"))
        commands.append((f"Use the adapter on {base}, plain PEFT:", f"PeftModel.from_pretrained(model, {path})"))
    commands.append(("All numbers, versions and seeds:", str(folder / "report.json")))
    lines = []
    for what, command in commands:
        lines += [Text(what), Text(f"  {command}", style="bold", no_wrap=True, overflow="ignore")]
    return lines
