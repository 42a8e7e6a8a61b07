"""`tuna-peft push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.terminal import echo


def push(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|STACK|MODEL", help="A run, a stack, or a folder written by merge or export gguf."),
    ],
    repo: Annotated[str, typer.Argument(help="NAME or ORGANISATION/NAME on the Hub; created if it does not exist.")],
    what: Annotated[
        str | None,
        typer.Option("--what", help="For a run, what to publish: adapters, merged or gguf.", show_default="adapters"),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch to commit to; created if it does not exist.", show_default="main"),
    ] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    base_id: Annotated[
        str | None,
        typer.Option("--base-id", help="Hub id of the base model, if training used a local copy.", show_default=False),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license", help="License identifier for the model card.", show_default="the base model's, if known"
        ),
    ] = None,
    data_license: Annotated[
        str | None,
        typer.Option("--data-license", help="License of the training data, for the model card.", show_default=False),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes; upload nothing.")
    ] = False,
) -> None:
    """Publish adapters, a merged model or GGUF files on the Hugging Face Hub; private by default."""
    from tuna_peft.errors import UserError
    from tuna_peft.export.hub import push as push_release
    from tuna_peft.export.release import KINDS

    kind = next((kind for kind in KINDS if kind == what), None)
    if what is not None and kind is None:
        raise UserError(f"{what!r} cannot be published", where="--what", fix=f"Use one of {', '.join(KINDS)}.")
    report = push_release(
        source, repo, kind=kind, private=not public, revision=revision, create_pr=pull_request, base_id=base_id,
        license=license, data_license=data_license, message=message, dry_run=dry_run,
    )  # fmt: skip
    for path, size in report.files.items():
        echo(f"{size:>15,}  {path}")
    total = sum(report.files.values()) / 2**20
    where = f"{'public' if public else 'private'} {report.repo_id}"
    if dry_run:
        echo(f"{len(report.files)} files, {total:,.1f} MiB, would be uploaded to {where}; nothing was uploaded")
    else:
        echo(f"{len(report.files)} files, {total:,.1f} MiB, are at {where}: {report.url}")
