"""All data of a recipe, read before anything is trained, so that a bad file costs seconds and not hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.config import DataSource
from tuna_peft.data.load import load_prompts, load_ranked, load_sft
from tuna_peft.data.tokenize import encode_dataset, prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.recipe.schema import Overflow, Recipe


@dataclass
class Inputs:
    """Encoded data by stage and for evaluation, with the counts of what was read, skipped and cut.

    Attributes:
        stages: Encoded training rows by stage name.
        ranked: Encoded held-out rows, or None.
        prompts: Held-out prompts as `{"id", "prompt", "record", "ids"}`, or None.
        counts: Reports of reading and tokenising, by stage name and under `evaluation.ranked` / `.prompts`.
    """

    stages: dict[str, Dataset] = field(default_factory=dict)
    ranked: Dataset | None = None
    prompts: list[dict[str, Any]] | None = None
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_inputs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Inputs:
    """Reads, checks and encodes everything that `recipe` names.

    Raises:
        UserError: See `tuna_peft.data.load` and `tuna_peft.data.tokenize`.
    """
    inputs = Inputs()
    context = getattr(config.get_text_config(), "max_position_embeddings", None)

    def encode(
        name: str, source: DataSource, load: Any, max_length: int | None, overflow: Overflow, **options: Any
    ) -> Dataset:
        dataset, read = load(source, recipe.prompt)
        limit = min((length for length in (max_length, context) if length is not None), default=None)
        try:
            encoded, tokens = encode_dataset(
                dataset, tokenizer, max_length=limit, overflow=overflow, on_bad_row=source.on_bad_row, **options
            )
        except UserError as error:
            place = f"{source.path}: {error.where}" if error.where else source.path
            raise UserError(error.what, where=place, fix=error.fix) from error
        inputs.counts[name] = {**read.as_dict(), "tokens": tokens.as_dict()}
        return encoded

    for stage in recipe.stages:
        load = load_sft if stage.type == "sft" else load_ranked
        inputs.stages[stage.name] = encode(
            stage.name, stage.data, load, stage.train.get("max_length", 1024), stage.overflow,
            needs_reference=stage.train.get("mle_on") == "reference",
        )  # fmt: skip
    evaluation = recipe.evaluation
    if evaluation and evaluation.ranked:
        inputs.ranked = encode(
            "evaluation.ranked",
            evaluation.ranked,
            load_ranked,
            evaluation.max_length,
            evaluation.overflow,
        )
    if evaluation and evaluation.prompts:
        inputs.prompts, read = load_prompts(evaluation.prompts, recipe.prompt)
        inputs.counts["evaluation.prompts"] = read.as_dict()
        for prompt in inputs.prompts:
            prompt["ids"] = prompt_ids(prompt["prompt"], tokenizer)
    return inputs
