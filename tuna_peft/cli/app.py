"""Registers the commands of `tuna-peft`."""

from __future__ import annotations

from typing import Annotated

import typer

import tuna_peft
from tuna_peft.cli import (
    combine,
    compare,
    data,
    divergence,
    doctor,
    evaluate,
    export,
    generate,
    judge,
    merge,
    plan,
    push,
    recipes,
    report,
    run,
    sample,
    schema,
    score,
)
from tuna_peft.cli.group import ErrorReportingGroup
from tuna_peft.terminal import echo

app = typer.Typer(
    cls=ErrorReportingGroup,
    help="Tuna: instruction tuning from ranked responses, with stacked LoRA adapters on a 4-bit base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"tuna-peft {tuna_peft.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May also follow the command.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command; `ErrorReportingGroup` reads `debug`."""


app.command("run")(run.run)
app.command("plan")(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.command("schema")(schema.schema)
app.command("sample", cls=sample.SampleCommand)(sample.sample)
app.command("score", cls=score.ScoreCommand)(score.score)
app.command("judge", cls=judge.JudgeCommand)(judge.judge)
app.command("combine")(combine.combine)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("merge")(merge.merge)
app.command("divergence")(divergence.divergence)
app.add_typer(export.app, name="export")
app.command("push")(push.push)
app.command("generate")(generate.generate)
app.command("doctor")(doctor.doctor)
