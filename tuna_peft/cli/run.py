"""`tuna-peft run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.cli.consent import Yes, require_consent
from tuna_peft.terminal import console


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, for example stages.sft.train.learning_rate=1e-4.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder.", show_default="runs/NAME")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what each stage would do; train nothing.")
    ] = False,
    launch: Annotated[
        Path | None,
        typer.Option(
            "--launch", metavar="CONFIG", help="Run on several GPUs, through `accelerate launch --config_file CONFIG`."
        ),
    ] = None,
    yes: Yes = False,
) -> None:
    """Train, evaluate and export as a recipe says. An interrupted run is resumed."""

    from tuna_peft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if launch is not None:
        from tuna_peft.cli.launch import launch_run

        if not dry_run:
            require_consent(loaded, yes=yes)  # before the processes start: they cannot ask
        raise typer.Exit(launch_run(launch, recipe, overrides or [], output, dry_run=dry_run))

    folder = output or Path("runs") / loaded.name
    if dry_run:
        from tuna_peft.run.dry_run import describe_recipe

        console().print(describe_recipe(loaded, folder), soft_wrap=True)
        return

    require_consent(loaded, yes=yes)
    from tuna_peft.cli.summary import run_summary
    from tuna_peft.run.pipeline import run_recipe

    report = run_recipe(loaded, folder)
    if report:  # only the first of several processes has it
        console().print(run_summary(report, folder), crop=False)
