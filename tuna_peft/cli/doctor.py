"""`tuna-peft doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from tuna_peft.terminal import echo

_SIGNS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "fail": ("✗", "red")}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check versions, GPU, dtypes, 4-bit quantization, disk and Hub. Exit code 1 if a run could not work."""
    from tuna_peft.cli.checks import run_checks

    checks = []
    for check in run_checks():
        checks.append(check)
        if not as_json:
            sign, colour = _SIGNS[check.status]
            echo(f" {sign} ", fg=colour, nl=False)
            echo(f"{check.name:<22}{check.detail}")
    if as_json:
        import dataclasses
        import json

        echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)
