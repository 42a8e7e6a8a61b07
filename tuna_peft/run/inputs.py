"""All data of a recipe, read before anything is trained, so that a bad file costs seconds and not hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.encode import encode_source
from tuna_peft.data.load import load_candidates, load_prompts, load_ranked, load_sft
from tuna_peft.data.ranked import Record
from tuna_peft.recipe.feedback_schema import FeedbackSource
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
    for stage in recipe.trained():
        if isinstance(stage.data, FeedbackSource):
            inputs.prompts[stage.name], inputs.counts[stage.name] = _read_prompts(stage.data, recipe)
            continue
        inputs.stages[stage.name], inputs.counts[stage.name] = encode_source(
            stage.data, load_sft if stage.type == "sft" else load_ranked, recipe.prompt, tokenizer, config,
            max_length=stage.train.get("max_length", 1024), overflow=stage.overflow,
            needs_reference=stage.train.get("mle_on") == "reference",
        )  # fmt: skip
    if recipe.evaluation:
        names = ["base", *(stage.name for stage in recipe.trained())]
        read = read_tasks(recipe.evaluation.tasks, recipe.prompt, tokenizer, config, names)
        inputs.ranked, inputs.tasks = read.ranked, read.tasks
        inputs.counts |= {f"evaluation.{task}": counts for task, counts in read.counts.items()}
    return inputs


def _read_prompts(source: FeedbackSource, recipe: Recipe) -> tuple[list[Record], dict[str, Any]]:
    """The prompts, or the prompts with their responses where nothing is sampled; and the counts of what was read.

    Raises:
        UserError: They cannot be read.
    """
    drawn = source.sample is not None or (source.score is not None and source.score.generate is not None)
    rows, report = (load_prompts if drawn else load_candidates)(source.prompts, recipe.prompt)
    return rows, {"prompts": report.as_dict()}
