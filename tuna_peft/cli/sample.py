"""`tuna-peft sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuna_peft.cli.options import (
    AnyModel,
    Column,
    Device,
    Format,
    OtherTemplate,
    Quantization,
    SkipBad,
    Split,
    StackBase,
    Upto,
    data_source,
    from_options,
    require_jsonl,
)

Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the samples, with each prompt's own text.")]


def sample(
    model: AnyModel,
    prompts: Annotated[str, typer.Argument(help="Prompts, in any format that can be read.")],
    out: Annotated[Path, typer.Argument(help="A .jsonl file to write.")],
    n: Annotated[int, typer.Option("--n", min=2, help="Responses per prompt.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the first draw.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Fewest tokens that hold this much probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest response.")] = 512,
    max_similarity: Annotated[
        float, typer.Option("--max-similarity", help="Draw again when two responses have this ROUGE-L F1 or more.")
    ] = 0.8,
    hotter_by: Annotated[float, typer.Option("--hotter-by", help="Added to the temperature for a new draw.")] = 0.1,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Draws at most; the most diverse is kept.")] = 3,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Responses generated at once.")] = 32,
    backend: Annotated[str, typer.Option("--backend", help="transformers or vllm.")] = "transformers",
    upto: Upto = None,
    base_model: StackBase = None,
    quantization: Quantization = "none",
    device: Device = "auto",
    template: OtherTemplate = None,
    format: Format = "auto",
    column: Column = None,
    split: Split = "train",
    skip_bad_rows: SkipBad = False,
) -> None:
    """Draw several different responses to each prompt; interrupted, the same command goes on."""
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.load import load_prompts
    from tuna_peft.feedback.sampling import sample_candidates
    from tuna_peft.feedback.settings import SampleSettings
    from tuna_peft.files import write_jsonl
    from tuna_peft.journal import Journal
    from tuna_peft.run.samplers import open_sampler

    settings = from_options(
        SampleSettings,
        {
            "n": n, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens,
            "max_similarity": max_similarity, "hotter_by": hotter_by, "trials": trials, "batch_size": batch_size,
            "backend": backend,
        },
    )  # fmt: skip
    wanted = None if template is None else from_options(PromptConfig, {"template": template})
    require_jsonl(out)
    source, _ = data_source(prompts, format, column, split, template or "none", skip_bad_rows)
    with open_sampler(model, backend, upto=upto, base_model=base_model, quantization=quantization, device=device) as (
        sampler,
        recorded,
    ):
        records, read = load_prompts(source, wanted or recorded)
        with Journal(out.with_suffix(".journal.jsonl")) as journal:
            found, report = sample_candidates(sampler, records, settings, journal, seed=seed)
    write_jsonl(out, found)
    typer.echo(f"wrote {out}: {report.responses:,} responses to {report.kept:,} of {read.read:,} prompts")
    for line in report.lines():
        typer.echo(f"  {line}")
