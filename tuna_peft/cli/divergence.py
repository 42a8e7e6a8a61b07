"""What `combine` and `merge` say of their distance from the stack, and on which prompts."""

from __future__ import annotations

import json
from pathlib import Path

import typer

PROMPTS = 16


def comparison_prompts(stack: Path, data: str | None, base_model: str | None) -> list[list[int]]:
    """Token ids of some prompts of `data`; without data, those that the run around the stack measured on, or none.

    Raises:
        UserError: The data cannot be read, or the base has no tokenizer.
    """
    if data is None:
        file = stack.parent / "divergence_prompts.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    from transformers import AutoTokenizer

    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.data.load import load_prompts
    from tuna_peft.data.texts import prompt_ids
    from tuna_peft.export.base_files import locate_base
    from tuna_peft.models.manifest import read_manifest

    manifest = read_manifest(stack)
    tokenizer = AutoTokenizer.from_pretrained(locate_base(manifest, base_model, stack))
    records, _ = load_prompts(DataSource(path=data, limit=PROMPTS), PromptConfig.model_validate(manifest.prompt))
    return [prompt_ids(record["prompt"], tokenizer) for record in records]


def print_divergence(
    stack: Path, export: Path, prompts: list[list[int]], *, upto: str | None, base_model: str | None
) -> None:
    """Loads stack and export, one after the other, and prints how far they are from each other."""
    from tuna_peft.export.check import check_exports

    measured = check_exports(stack, [export], prompts, upto=upto, base_model=base_model)[str(export)]
    typer.echo(
        f"KL divergence from the stack: mean {measured.kl_mean:.2e}, largest {measured.kl_max:.2e} nats; "
        f"same next token in {measured.top1_agreement:.1%} of {measured.tokens:,} tokens"
    )
