"""`tuna-peft benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.terminal import echo

app = typer.Typer(help="Download published benchmarks.", no_args_is_help=True)


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="natural-instructions, lmentry or vicuna.")],
    folder: Annotated[Path | None, typer.Argument(help="Where to write.", show_default="data/NAME")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="Server to download from, with GitHub's paths.", show_default="raw.githubusercontent.com"
        ),
    ] = None,
) -> None:
    """Download a benchmark at a fixed version. If interrupted, run the same command again to resume."""
    from tuna_peft.run.published import ADDRESS, PUBLISHED, fetch_benchmark

    folder = folder or Path("data") / name
    new, digest = fetch_benchmark(name, folder, (address or ADDRESS).rstrip("/"))
    published = PUBLISHED[name]
    echo(f"{folder}: {published.repository} at {published.version}, {new} files downloaded")
    echo(f"license: {published.license}")
    checked = "checked" if published.digest else "recorded in fetched.json; no published hash to compare with"
    echo(f"SHA-256 of all files: {digest} ({checked})")
