"""`tuna-peft combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.cli.options import BasePath, Check, Prompts, Stack
from tuna_peft.terminal import echo


def combine(
    stack: Stack,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, help="Compress to this rank.", show_default="the sum of the ranks, which is exact"
        ),
    ] = None,
    with_base: Annotated[
        bool,
        typer.Option(
            "--with-base",
            help="Write the base beside the adapter, in the 4 bits of training; transformers loads both as one model.",
        ),
    ] = False,
    upto: Annotated[
        str | None, typer.Option("--upto", help="Combine the stack up to this stage.", show_default="all")
    ] = None,
    base_model: BasePath = None,
    prompts: Prompts = None,
    check: Check = True,
) -> None:
    """Concatenate a stack of adapters into one adapter, which plain PEFT loads on the base model."""
    from tuna_peft.cli.divergence import comparison_prompts, print_divergence
    from tuna_peft.export.combine import COMPRESSION, combine_stack
    from tuna_peft.models.stack.find import find_stack

    source = find_stack(stack)
    ids = comparison_prompts(source, prompts, base_model)
    report = combine_stack(source, out, upto=upto, rank=rank, with_base=with_base, base_model=base_model)
    echo(
        f"wrote {report.path}: {' + '.join(report.adapters)} as one adapter of rank {report.rank} on "
        f"{report.modules} modules, {report.nbytes / 2**20:,.1f} MiB, {report.seconds:.1f} s"
    )
    if report.compression_error:
        echo(
            "the smaller rank changed the update of a module by {mean:.1%} on average, {max:.1%} at most".format(
                **report.compression_error
            )
            + f" (Frobenius norm); each in {out / COMPRESSION}"
        )
    if ids and check:
        print_divergence(source, [out], ids, upto=upto, base_model=base_model)
