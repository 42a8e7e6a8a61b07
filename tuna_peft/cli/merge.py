"""`tuna-peft merge`."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.cli.options import AllowLostUpdate, BasePath, Check, Prompts, Stack
from tuna_peft.errors import UserError
from tuna_peft.terminal import echo


def merge(
    stack: Stack,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16, float32, nf4 or int8.")] = "bfloat16",
    base: Annotated[
        str,
        typer.Option(
            "--base", help="Merge into the base model as in training (dequantized) or as published (original)."
        ),
    ] = "dequantized",
    upto: Annotated[
        str | None, typer.Option("--upto", help="Merge the stack up to this stage.", show_default="all")
    ] = None,
    base_model: BasePath = None,
    prompts: Prompts = None,
    check: Check = True,
    allow_lost_update: AllowLostUpdate = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also measure all other export options, and print a table. They are deleted again."
        ),
    ] = False,
) -> None:
    """Merge a stack of adapters into its base model. The base is dequantized once and rounded once."""
    from tuna_peft.cli.divergence import comparison_prompts, print_divergence, print_routes
    from tuna_peft.export.compare_exports import compare_exports
    from tuna_peft.export.merge import merge_stack
    from tuna_peft.models.stack.find import find_stack

    source = find_stack(stack)
    ids = comparison_prompts(source, prompts, base_model)
    if compare and not ids:
        raise UserError("--compare needs prompts", fix="Give data with --prompts, or the folder of a run.")
    report = merge_stack(
        source,
        out,
        dtype=dtype,
        base=base,  # type: ignore[arg-type]
        upto=upto,
        base_model=base_model,
        allow_lost_update=allow_lost_update,
    )
    echo(
        f"wrote {report.path}: {' + '.join(report.adapters)} merged into the {report.base} base, {report.dtype}, "
        f"{report.nbytes / 2**20:,.1f} MiB, {report.seconds:.1f} s"
    )
    if report.kept_update is not None:
        echo(f"rounding to {report.dtype}: {report.kept_update}")
    if compare:
        write_gguf = None
        if importlib.util.find_spec("gguf") is not None:
            from tuna_peft.export.gguf.model import export_gguf

            write_gguf = partial(export_gguf, stack_dir=source, allow_lost_update=True)
        beside = out.absolute().parent
        print_routes(compare_exports(source, ids, beside, upto=upto, base_model=base_model, write_gguf=write_gguf))
    elif ids and check:
        print_divergence(source, [out], ids, upto=upto, base_model=base_model)
