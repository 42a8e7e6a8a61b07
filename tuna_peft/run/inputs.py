"""All data of a recipe, read before anything is trained, so that a bad file costs seconds and not hours.

`tuna_peft.run.pipeline` calls `read_inputs` at the start; `tuna_peft.run.rank_samples` calls `encode_rows` for
examples that the run has ranked itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import (
    Placed,
    Select,
    encode_source,
    iterate_ranked,
    load_candidates,
    load_prompts,
    renderable,
)
from tuna_peft.data.losses import report_losses
from tuna_peft.data.ranked import ReadReport, Record
from tuna_peft.limits import context_length
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages, stage_names
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.held_out import HeldOut, held_out_tasks, hold_out, self_ranked_task
from tuna_peft.run.tasks import Task, read_tasks

RANKED = "ranked.jsonl"
"""In the folder of a stage: the responses that the run has ranked itself."""


@dataclass
class Inputs:
    """The data of all stages and of the evaluation, with counts of what was read, skipped and truncated.

    Attributes:
        stages: Encoded training examples by stage name. A stage whose responses the run ranks itself is added once
            they are ranked.
        prompts: For those stages, by name: the prompts, with responses if the run does not sample them.
        ranked: Encoded held-out examples for the task `ranking` that the recipe names; None without it.
        tasks: The tasks of the evaluation.
        held_out: The prompts that `evaluation: auto` holds back.
        counts: What happened to records and examples in reading and tokenizing, by stage name and under
            `evaluation.<task>`.
    """

    stages: dict[str, Dataset] = field(default_factory=dict)
    prompts: dict[str, list[Record]] = field(default_factory=dict)
    ranked: Dataset | None = None
    tasks: list[Task] = field(default_factory=list)
    held_out: HeldOut = field(default_factory=HeldOut)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_inputs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Inputs:
    """Reads, checks and encodes all data that `recipe` names. Responses that the run ranks itself are encoded later.

    Args:
        tokenizer: The tokenizer of the base.
        config: The configuration of the base.

    Raises:
        UserError: See `tuna_peft.data.load`, `tuna_peft.data.tokenize` and `tuna_peft.run.tasks`.
    """
    inputs, stages, auto = Inputs(), resolve_stages(recipe), recipe.evaluation == "auto"
    for stage in stages:
        if stage.feedback is not None:
            inputs.prompts[stage.name], report = read_prompts(stage, recipe.prompt, tokenizer)
            report_losses(stage.source, report.as_dict())
            inputs.counts[stage.name] = {"prompts": report.as_dict()}
    if auto:

        def read(stage: ResolvedStage) -> Iterable[Placed]:
            if stage.feedback is None:
                return iterate_ranked(stage.source, recipe.prompt, ReadReport(), pairs=True)
            return [("", row) for row in inputs.prompts[stage.name]]

        inputs.held_out = hold_out(stages, read, recipe.seed)
    held_out = inputs.held_out
    for stage in stages:
        if stage.feedback is not None:
            inputs.prompts[stage.name] = held_out.to_rank(stage, inputs.prompts[stage.name])
        else:
            inputs.stages[stage.name], inputs.counts[stage.name] = encode_rows(
                stage, stage.source, recipe.prompt, tokenizer, config, partial(held_out.training, stage)
            )
    if held_out.records:

        def encode(stage: ResolvedStage) -> Dataset:
            select = partial(held_out.measured, stage)
            return _encode(stage, stage.source, recipe.prompt, tokenizer, config, select, measured=True)[0]

        inputs.tasks = held_out_tasks(held_out, stages, recipe.prompt, context_length(config), encode)
        inputs.counts["evaluation"] = {"held_out": {name: len(records) for name, records in held_out.records.items()}}
    elif settings := recipe.named_evaluation:
        read_data = read_tasks(settings.tasks, recipe.prompt, tokenizer, config, stage_names(recipe))
        inputs.ranked, inputs.tasks = read_data.ranked, read_data.tasks
        inputs.counts |= {f"evaluation.{task}": counts for task, counts in read_data.counts.items()}
    return inputs


def read_prompts(
    stage: ResolvedStage, prompt: PromptConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[Record], ReadReport]:
    """The prompts, or prompts with responses, that a stage with feedback ranks, and what was read and left out.

    Args:
        tokenizer: That of the base; None keeps prompts that its chat template may refuse.

    Raises:
        UserError: See `tuna_peft.data.load`.
    """
    load = load_prompts if stage.generated else load_candidates
    rows, report = load(stage.source, prompt)
    if tokenizer is not None:
        rows = renderable(rows, tokenizer, stage.source, report)
    return rows, report


def encode_self_ranked(
    inputs: Inputs,
    stage: ResolvedStage,
    file: Path,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> dict[str, Any]:
    """Adds to `inputs` what a stage with feedback trains on, and the task on its held-back prompts if there are any.

    An example that cannot be used is skipped and counted: an error would waste what was sampled and ranked.

    Args:
        file: The ranked responses, in the ranked type.

    Returns:
        Counts of what was kept, skipped and truncated.
    """
    source = DataSource(
        path=str(file), format="ranked", on_bad_row="skip", add_reference=stage.source.add_reference
    )  # fmt: skip
    held_out = inputs.held_out
    inputs.stages[stage.name], counts = encode_rows(
        stage, source, prompt, tokenizer, config, partial(held_out.training, stage)
    )

    def encode(stage: ResolvedStage) -> Dataset:
        select = partial(held_out.measured, stage)
        return _encode(stage, source, prompt, tokenizer, config, select, measured=True)[0]

    if (task := self_ranked_task(held_out, stage, inputs.tasks, encode)) is not None:
        inputs.tasks.append(task)
    return counts


def encode_rows(
    stage: ResolvedStage,
    source: DataSource,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    select: Select | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """The training examples of `stage`, read from `source` and encoded for its trainer; the log says what is lost.

    Args:
        select: See `tuna_peft.data.load.encode_source`.

    Returns:
        The encoded examples, and counts of what was kept, skipped and truncated.

    Raises:
        UserError: See `tuna_peft.data.load.encode_source`.
    """
    rows, counts = _encode(stage, source, prompt, tokenizer, config, select)
    report_losses(source, counts)
    return rows, counts


def _encode(
    stage: ResolvedStage,
    source: DataSource,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    select: Select | None,
    *,
    measured: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    return encode_source(
        source, prompt, tokenizer, config, supervised=stage.type == "sft" and not measured, select=select,
        max_length=stage.max_length, overflow=stage.overflow, needs_reference=stage.needs_reference,
        needs_scores=stage.needs_scores,
    )  # fmt: skip
