"""`tuna-peft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.terminal import echo


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not, or of an evaluation.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Id of a prompt to show with every stage's response. Repeatable."),
    ] = None,
) -> None:
    """Write report.html, report.json and report.md of a run or an evaluation again, from its saved results."""
    from tuna_peft.evaluation.report.write import write_report

    write_report(run, prompt or [])
    echo(f"wrote {run / 'report.html'}, with report.json and report.md beside it")
