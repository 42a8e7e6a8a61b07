"""The last thing that `run` prints: the table, and the commands to go on with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def run_summary(report: dict[str, Any], folder: Path) -> RenderableType:
    """The base and every stage with their held-out measures, and what a user would do next.

    Args:
        report: As `run_recipe` returns it.
        folder: The run's folder.
    """
    return Group(_table(report), Text(), *_next_commands(report, folder))


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['name']}: held-out measures")
    table.add_column("after")
    for heading in ("ranking accuracy", "response score", "steps", "tokens", "seconds", "peak GiB"):
        table.add_column(heading, justify="right")
    for name, measures in report["evaluation"].items():
        stage = report["stages"].get(name) or {}
        table.add_row(
            name,
            _number(measures.get("ranking_accuracy"), ".3f"),
            _number(measures.get("response_score"), ".3f"),
            _number(stage.get("steps"), ","),
            _number(stage.get("tokens"), ","),
            _number(stage.get("seconds"), ".0f"),
            _number(stage.get("peak_memory_gib"), ".2f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


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
