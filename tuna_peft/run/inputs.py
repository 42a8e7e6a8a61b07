"""All data of a recipe, read before anything is trained, so that a bad file costs seconds and not hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.encode import encode_source
from tuna_peft.data.load import load_candidates, load_prompts, load_ranked, load_sft
from tuna_peft.data.ranked import Record
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages, stage_names
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.tasks import Task, read_tasks


@dataclass
class Inputs:
    """Encoded data by stage and for evaluation, with the counts of what was read, skipped and cut.

    Attributes:
        stages: Encoded training rows by stage name; of a stage whose ranks the run makes, once they are made.
        prompts: Of those stages, what is sampled from, scored or judged, by stage name.
        ranked: Encoded held-out rows, or None.
        tasks: What to evaluate.
        counts: Reports of reading and tokenising, by stage name and under `evaluation.<task>`.
    """

    stages: dict[str, Dataset] = field(default_factory=dict)
    prompts: dict[str, list[Record]] = field(default_factory=dict)
    ranked: Dataset | None = None
    tasks: list[Task] = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_inputs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Inputs:
    """Reads, checks and encodes everything that `recipe` names; ranks that the run makes itself come later.

    Raises:
        UserError: See `tuna_peft.data.load`, `tuna_peft.data.tokenize` and `tuna_peft.run.tasks`.
    """
    inputs = Inputs()
    for stage in resolve_stages(recipe):
        if stage.feedback is not None:
            read = load_prompts if stage.drawn else load_candidates
            inputs.prompts[stage.name], report = read(stage.source, recipe.prompt)
            inputs.counts[stage.name] = {"prompts": report.as_dict()}
        else:
            inputs.stages[stage.name], inputs.counts[stage.name] = encode_rows(
                stage, stage.source, recipe.prompt, tokenizer, config
            )
    if recipe.evaluation:
        read_data = read_tasks(recipe.evaluation.tasks, recipe.prompt, tokenizer, config, stage_names(recipe))
        inputs.ranked, inputs.tasks = read_data.ranked, read_data.tasks
        inputs.counts |= {f"evaluation.{task}": counts for task, counts in read_data.counts.items()}
    return inputs


def encode_rows(
    stage: ResolvedStage,
    source: DataSource,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> tuple[Dataset, dict[str, Any]]:
    """The training rows of `stage`, read from `source` and encoded as its trainer wants them.

    Returns:
        The encoded rows, and what became of records and rows.

    Raises:
        UserError: See `tuna_peft.data.encode.encode_source`.
    """
    load = load_sft if stage.type == "sft" else load_ranked
    return encode_source(
        source, load, prompt, tokenizer, config,
        max_length=stage.max_length, overflow=stage.overflow, needs_reference=stage.needs_reference,
    )  # fmt: skip
