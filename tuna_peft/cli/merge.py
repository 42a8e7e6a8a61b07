"""`tuna-peft merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def merge(
    stack: Annotated[
        str, typer.Argument(metavar="STACK|RUN", help="A folder with stack.json, a run's folder, or a Hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16, float32, or nf4.")] = "bfloat16",
    base: Annotated[
        str, typer.Option("--base", help="Add to the dequantised weights of training, or to the original ones.")
    ] = "dequantised",
    upto: Annotated[
        str | None, typer.Option("--upto", help="Merge the stack up to this stage.", show_default="all")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Where the base is now.", show_default="as recorded")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="Data: measure on 16 of its prompts how far the model is from the stack.",
            show_default="of a run: the run's own",
        ),
    ] = None,
) -> None:
    """Merge a stack of adapters into its base: one model, dequantised once and rounded once."""
    from tuna_peft.export.merge import merge_stack
    from tuna_peft.models.find_stack import find_stack

    source = find_stack(stack)
    report = merge_stack(source, out, dtype=dtype, base=base, upto=upto, base_model=base_model)  # type: ignore[arg-type]
    typer.echo(
        f"wrote {report.path}: {' + '.join(report.adapters)} merged into the {report.base} base, {report.dtype}, "
        f"{report.nbytes / 2**20:,.1f} MiB, {report.seconds:.1f} s"
    )
    if report.requantisation_error:
        typer.echo(
            "quantising again changed the weights of a module by {mean:.1%} on average, {max:.1%} at most "
            "(Frobenius norm)".format(**report.requantisation_error)
        )
    ids = _prompt_ids(source, out, prompts) if prompts is not None else _prompts_of_run(source.parent)
    if ids:
        from tuna_peft.export.check import check_exports

        measured = check_exports(source, [out], ids, upto=upto, base_model=base_model)[str(out)]
        typer.echo(
            f"KL divergence from the stack: mean {measured.kl_mean:.2e}, largest {measured.kl_max:.2e} nats; "
            f"same next token in {measured.top1_agreement:.1%} of {measured.tokens:,} tokens"
        )


def _prompts_of_run(run: Path) -> list[list[int]]:
    file = run / "divergence_prompts.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def _prompt_ids(source: Path, out: Path, data: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.data.load import load_prompts
    from tuna_peft.data.texts import prompt_ids
    from tuna_peft.models.manifest import read_manifest

    template = PromptConfig.model_validate(read_manifest(source).prompt)
    tokenizer = AutoTokenizer.from_pretrained(out)
    records, _ = load_prompts(DataSource(path=data, limit=16), template)
    return [prompt_ids(record["prompt"], tokenizer) for record in records]
