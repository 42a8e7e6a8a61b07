"""`tuna-peft merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    stack: Annotated[Path, typer.Argument(metavar="STACK|RUN", help="A folder with stack.json, or a run's folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    base: Annotated[
        str,
        typer.Option("--base", help="dequantised: add to the weights that the stack was trained on; original: to the stored."),
    ] = "dequantised",
    upto: Annotated[
        str | None, typer.Option("--upto", help="Merge the stack up to this stage.", show_default="all")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Where the base is now.", show_default="as recorded")
    ] = None,
) -> None:
    """Merge a stack of adapters into its base: one 16-bit model, dequantised once and rounded once."""
    from tuna_peft.export.merge import merge_stack

    inside = stack / "stack"
    source = inside if (inside / "stack.json").is_file() else stack
    report = merge_stack(source, out, dtype=dtype, base=base, upto=upto, base_model=base_model)  # type: ignore[arg-type]
    typer.echo(
        f"wrote {report.path}: {' + '.join(report.adapters)} merged into the {report.base} base, {report.dtype}, "
        f"{report.nbytes / 2**20:,.1f} MiB, {report.seconds:.1f} s"
    )
