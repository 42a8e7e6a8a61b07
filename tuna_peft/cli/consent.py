"""Prints what a recipe runs and where it sends data, and asks before an unusual variable is sent."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tuna_peft.errors import UserError
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from pydantic import BaseModel

Yes = Annotated[
    bool,
    typer.Option("--yes", help="Send environment variables that are not called ..._API_KEY without asking."),
]


def require_consent(settings: BaseModel, *, yes: bool) -> None:
    """Prints the foreign code and the addresses of `settings`; asks whether unusual variables may be sent.

    Raises:
        UserError: There is such a variable, and nobody who could be asked.
        typer.Abort: The answer is no.
    """
    from tuna_peft.recipe.reach import addresses, foreign_code, unusual_variables

    if os.environ.get("RANK", "0") == "0":  # the first of several processes
        for line in (*foreign_code(settings), *addresses(settings)):
            echo(f"this recipe {line}", err=True)
    if yes or not (names := unusual_variables(settings)):
        return
    ask(f"this would send the environment variable {' and '.join(names)} to a server")


def ask(what: str, where: str | None = None) -> None:
    """Asks the user to confirm.

    Raises:
        UserError: There is no terminal.
        typer.Abort: The answer is no.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError(f"{what}, and there is no terminal to ask you", where=where, fix="Confirm with --yes.")
    typer.confirm(f"{what}; continue?", abort=True, err=True)
