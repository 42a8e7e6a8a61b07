"""Registers the commands of `tuna-peft`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import tuna_peft
from tuna_peft.cli import (
    benchmarks,
    chat,
    combine,
    compare,
    data,
    divergence,
    doctor,
    evaluate,
    export,
    generate,
    init,
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
    serve,
)
from tuna_peft.cli.group import DATA, EXPORT, FEEDBACK, MACHINE, RESULTS, TRAIN, ErrorReportingGroup
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


def _add(panel: str, name: str, command: Any, example: str, **options: Any) -> None:
    """Registers a command, or a group of commands, under a heading of `--help`, with an example at its end."""
    shown = {"rich_help_panel": panel, "epilog": f"Example: tuna-peft {example}", **options}
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name, **shown)
    else:
        app.command(name, **shown)(command)


_add(TRAIN, "init", init.init, "init mine.yaml --data ratings.csv --model Qwen/Qwen3-1.7B")
_add(TRAIN, "recipes", recipes.app, "recipes copy two-stage mine.yaml")
_add(TRAIN, "schema", schema.schema, "schema --field stages.train.margin")
_add(TRAIN, "plan", plan.plan, "plan mine.yaml --gpu T4 lora.r=32")
_add(TRAIN, "run", run.run, "run mine.yaml --output runs/mine")
_add(DATA, "data", data.app, "data inspect ratings.csv")
_add(DATA, "benchmarks", benchmarks.app, "benchmarks fetch lmentry")
_add(FEEDBACK, "sample", sample.sample, "sample runs/mine prompts.jsonl samples.jsonl", cls=sample.SampleCommand)
_add(FEEDBACK, "score", score.score, "score samples.jsonl ranked.jsonl --model TEACHER", cls=score.ScoreCommand)
_add(FEEDBACK, "judge", judge.judge, "judge samples.jsonl ranked.jsonl --model JUDGE", cls=judge.JudgeCommand)
_add(RESULTS, "generate", generate.generate, 'generate runs/mine "Name a color."', cls=generate.GenerateCommand)
_add(RESULTS, "chat", chat.chat, "chat runs/mine", cls=chat.ChatCommand)
_add(RESULTS, "serve", serve.serve, "serve runs/mine --engine llama.cpp")
_add(RESULTS, "evaluate", evaluate.evaluate, "evaluate runs/mine")
_add(RESULTS, "compare", compare.compare, "compare runs/mine@base runs/mine")
_add(RESULTS, "report", report.report, "report runs/mine")
_add(EXPORT, "combine", combine.combine, "combine runs/mine combined")
_add(EXPORT, "merge", merge.merge, "merge runs/mine merged")
_add(EXPORT, "export", export.app, "export gguf runs/mine gguf")
_add(EXPORT, "divergence", divergence.divergence, "divergence runs/mine merged")
_add(EXPORT, "push", push.push, "push runs/mine YOUR_NAME/my-model --what merged --dry-run")
_add(MACHINE, "doctor", doctor.doctor, "doctor")
