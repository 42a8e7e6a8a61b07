"""`tuna-peft serve`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.cli.options import Device
from tuna_peft.terminal import echo


def serve(
    run: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, a merged model, or a GGUF file.")],
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", help="vllm, llama.cpp, transformers or ollama.", show_default="the first that is installed"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name in requests.", show_default="the run's")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    print_only: Annotated[bool, typer.Option("--print", help="Only print the command.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare greedy answers with those of the unmerged adapters.")
    ] = True,
    device: Device = "auto",
) -> None:
    """Start an existing server on what a run exported, and check its answers; Ctrl-C ends it."""
    from tuna_peft.run.serve import choose_engine, expected_answers, find_exports, run_server

    exports = find_exports(Path(run), name, host, port)
    chosen = choose_engine(exports, engine, installed=not print_only)
    echo(shlex.join(exports[chosen].command(chosen)), err=not print_only)
    if print_only:
        return
    expected = expected_answers(Path(run), device) if check else None
    if check and expected is None:
        echo("not checked: there are no unmerged adapters to compare with", err=True)
    run_server(exports[chosen], chosen, expected, lambda line: echo(line, err=True))
