"""All data of a recipe, read before anything is trained, so that a bad file costs seconds and not hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.config import DataSource
from tuna_peft.data.load import load_ranked, load_sft
from tuna_peft.data.tokenize import encode_dataset
from tuna_peft.errors import UserError
from tuna_peft.recipe.evaluate import Task, graded_task, ranking_task
from tuna_peft.recipe.evaluation_schema import TaskSettings
from tuna_peft.recipe.schema import Overflow, Recipe


@dataclass
class Inputs:
    """Encoded data by stage and for evaluation, with the counts of what was read, skipped and cut.

    Attributes:
        stages: Encoded training rows by stage name.
        ranked: Encoded held-out rows, or None.
        tasks: What to evaluate.
        counts: Reports of reading and tokenising, by stage name and under `evaluation.<task>`.
    """

    stages: dict[str, Dataset] = field(default_factory=dict)
    ranked: Dataset | None = None
    tasks: list[Task] = field(default_factory=list)
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
    tasks = recipe.evaluation.tasks if recipe.evaluation else TaskSettings()
    if tasks.ranking:
        inputs.ranked = encode("evaluation.ranking", tasks.ranking, load_ranked, tasks.ranking.max_length,
                               tasks.ranking.overflow)  # fmt: skip
        inputs.tasks.append(ranking_task(tasks.ranking, inputs.ranked))
    if tasks.graded:
        task, inputs.counts["evaluation.graded"] = graded_task(tasks.graded, recipe.prompt)
        inputs.tasks.append(task)
    return inputs
