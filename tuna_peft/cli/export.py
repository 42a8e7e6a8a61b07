"""`tuna-peft export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuna_peft.cli.options import AllowLostUpdate, Check, Prompts
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.export.gguf.model import GGUFReport

app = typer.Typer(help="Write a model for other programs.", no_args_is_help=True)


@app.callback()
def export() -> None:
    """Write a model for other programs."""


@app.command("gguf")
def gguf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL|STACK|ADAPTER",
            help="A merged model or a base model; a stack or an adapter becomes a GGUF adapter.",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            "-t",
            help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with llama-quantize q4_k_m ...; may be repeated.",
            show_default="q8_0",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the file.", show_default="name of the source")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="For a run: export its stack as a GGUF adapter, not its merged model.")
    ] = False,
    upto: Annotated[
        str | None, typer.Option("--upto", help="For a stack: use the stages up to this one.", show_default="all")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            help="For a stack or an adapter: path or Hub id of its base model, if it has moved.",
            show_default="as recorded",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="auto: merge a stack into each base, and keep for each type the file with the smaller KL divergence.",
            show_default="the merged model as it is",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="Importance matrix for K-quants, from llama-imatrix.")
    ] = None,
    prompts: Prompts = None,
    check: Check = True,
    allow_lost_update: AllowLostUpdate = False,
) -> None:
    """Write GGUF files for llama.cpp, Ollama and LM Studio, and a Modelfile with the prompt template of training."""
    from tuna_peft.cli.divergence import comparison_prompts, print_divergence
    from tuna_peft.errors import UserError
    from tuna_peft.export.gguf import require_gguf
    from tuna_peft.models.stack.manifest import MANIFEST

    require_gguf()
    from tuna_peft.export.gguf.adapter import export_gguf_adapter
    from tuna_peft.export.gguf.model import export_gguf, read_record

    folder = Path(source)
    measured_by: tuple[Path, str] | None = None  # a stack, and the last of its stages in the model
    if base is not None:
        if base != "auto" or adapter:
            raise UserError(f"--base {base} cannot be used here", fix="Use --base auto, for model files of a stack.")
        _export_choosing_the_base(
            source, out, types, name, upto, base_model, imatrix, prompts, allow_lost_update=allow_lost_update
        )
        return
    # A published stack has `stack/` too, beside the combined adapter.
    if (folder / "stack" / MANIFEST).is_file() and not (folder / "adapter_config.json").is_file():
        name = name or folder.resolve().name
        folder = folder / ("stack" if adapter else "merged")
        if not folder.is_dir():
            raise UserError(
                "this run has no merged model", where=source, fix=f"Make one: tuna-peft merge {source} MODEL"
            )
    if (folder / MANIFEST).is_file() or (folder / "adapter_config.json").is_file():
        if types is not None and len(types) > 1:
            raise UserError("an adapter is written in one type", where="--type", fix="Use f32 or f16.")
        [wanted] = types or ["f32"]
        report = export_gguf_adapter(
            folder, out, type=wanted, name=name or folder.resolve().name, upto=upto, base_model=base_model
        )
    else:
        for option, value in (("--upto", upto), ("--base-model", base_model), ("--adapter", adapter or None)):
            if value is not None:
                raise UserError(f"{option} needs a stack; this is a single model", where=source)
        record, stack = read_record(folder), folder.resolve().parent / "stack"
        if record.get("kind") == "merged" and (stack / MANIFEST).is_file():
            measured_by = stack, record["stack"]["adapters"][-1]["name"]
        report = export_gguf(
            folder, out, types=types or ("q8_0",), name=name, imatrix=imatrix,
            stack_dir=measured_by and measured_by[0], allow_lost_update=allow_lost_update,
        )  # fmt: skip
    _print_report(report)
    if measured_by is None:
        if prompts is not None:
            raise UserError("--prompts needs a run; there is no stack here to measure against", where=source)
    elif check and (ids := comparison_prompts(measured_by[0], prompts, base_model)):
        print_divergence(measured_by[0], [out], ids, upto=measured_by[1], base_model=base_model)


def _export_choosing_the_base(
    source: str,
    out: Path,
    types: list[str] | None,
    name: str | None,
    upto: str | None,
    base_model: str | None,
    imatrix: Path | None,
    prompts: str | None,
    *,
    allow_lost_update: bool,
) -> None:
    from tuna_peft.cli.divergence import comparison_prompts
    from tuna_peft.export.gguf.choose import export_gguf_of_stack
    from tuna_peft.models.stack.find import find_stack

    stack = find_stack(source)
    report, measured = export_gguf_of_stack(
        stack, out, comparison_prompts(stack, prompts, base_model), types=types or ("q8_0",),
        name=name or Path(source).resolve().name, upto=upto, base_model=base_model, imatrix=imatrix,
        allow_lost_update=allow_lost_update,
    )  # fmt: skip
    for file, found in measured.items():
        for chosen, divergence in found.items():
            echo(f"{file}, {chosen} base: KL divergence from the stack: {divergence}")
    _print_report(report)


def _print_report(report: GGUFReport) -> None:
    for file, size in report.files.items():
        echo(f"wrote {report.path / file}: {size / 2**20:,.1f} MiB")
        if kept := report.kept_in_f16[file]:
            echo(f"  {len(kept)} tensors in f16, because their row length is not a multiple of 32: {kept[0]} ...")
        if update := report.kept_update[file]:
            echo(f"  {update}")
    echo(f"{report.seconds:.1f} s; with Ollama: ollama create NAME -f {report.path / 'Modelfile'}")
