"""`tuna-peft recipes`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.errors import UserError
from tuna_peft.terminal import console, echo

app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)

_Name = Annotated[str, typer.Argument(help="Name of a shipped recipe.")]


@app.command("list")
def list_recipes() -> None:
    """List the recipes, with the purpose of each."""
    from tuna_peft.recipe.shipped import shipped_recipes, summary

    known = shipped_recipes()
    indent = " " * (max(map(len, known), default=0) + 2)
    columns = console().width if sys.stdout.isatty() else sys.maxsize  # one line each for `grep`
    for name, file in known.items():
        echo(textwrap.fill(f"{name:<{len(indent)}}{summary(file)}", columns, subsequent_indent=indent))


@app.command("show")
def show_recipe(name: _Name) -> None:
    """Print a recipe."""
    from tuna_peft.recipe.shipped import shipped_recipe

    echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def copy_recipe(
    name: _Name,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder.", show_default="./NAME.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from tuna_peft.files import write_text
    from tuna_peft.recipe.shipped import shipped_recipe

    file = shipped_recipe(name)
    target = destination or Path()
    if target.is_dir():
        target = target / file.name
    if target.exists() and not force:
        raise UserError(
            "the file exists already", where=str(target), fix="Give another DEST, or --force to overwrite it."
        )
    write_text(target, file.read_text(encoding="utf-8"))
    echo(f"wrote {target}")
