"""Each stage of a recipe resolved once: rounds written out, defaults filled in, what stands below it known.

`Recipe` is what the user wrote. Everything that runs, plans, checks or describes a stage reads a `ResolvedStage`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tuna_peft.data.config import DataSource, Overflow
from tuna_peft.recipe.feedback_schema import FeedbackSource
from tuna_peft.recipe.schema import LoraSettings, Recipe, StageType
from tuna_peft.recipe.train_fields import train_fields


@dataclass(frozen=True)
class ResolvedStage:
    """One adapter to train.

    Attributes:
        name: Names the adapter and its folder; rounds of a stage are NAME-1, NAME-2 ...
        type: `sft` or `ranking`.
        section: The stage's name in the recipe, which its rounds share.
        source: The data that is read: training rows, or the prompts to rank responses for.
        feedback: How the run makes the ranks; None where `source` holds the training rows.
        overflow: What happens to a response beyond `max_length`.
        lora: The adapter's settings, those of the stage over those of the recipe.
        given: The trainer's fields that the recipe sets.
        below: The adapters of the stack that it trains on, from bottom to top, all frozen.
        replaces: The adapter of the round before, whose weights it starts from and whose place it takes; not in
            `below`.
        replaced_by: The round that takes this one's place.
        samples_from: The adapters whose responses are sampled, from bottom to top; none of them is the base.
    """

    name: str
    type: StageType
    section: str
    source: DataSource
    feedback: FeedbackSource | None
    overflow: Overflow
    lora: LoraSettings
    given: dict[str, Any]
    below: tuple[str, ...] = ()
    replaces: str | None = None
    replaced_by: str | None = None
    samples_from: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The stage's dotted key in the recipe: what overrides begin with and what errors name."""
        return f"stages.{self.section}"

    @property
    def drawn(self) -> tuple[int, int] | None:
        """`(responses per prompt, most tokens of each)` that the run's model or the teacher's server generates.

        None where nothing is generated: the responses are those of `source`.
        """
        if self.feedback is None:
            return None
        if (sample := self.feedback.sample) is not None:
            return sample.n, sample.max_new_tokens
        generate = self.feedback.score and self.feedback.score.generate
        return (generate.n, generate.max_tokens) if generate else None

    @cached_property
    def train(self) -> dict[str, Any]:
        """Every field of the trainer's configuration, with its default where the recipe sets none. Imports torch."""
        return {name: field.default for name, field in train_fields(self.type).items()} | self.given

    @property
    def max_length(self) -> int | None:
        """Longest prompt with one response, in tokens; None is the model's context."""
        return self.train["max_length"]

    @property
    def needs_reference(self) -> bool:
        """Whether every row needs a reference response."""
        return self.train.get("mle_on") == "reference"

    @property
    def checkpoints_activations(self) -> bool:
        """Whether layers may recompute their activations in the backward pass, under either name of the field."""
        return self.given.get("activation_checkpointing", self.given.get("gradient_checkpointing", True))

    def update_steps(self, rows: int, processes: int = 1) -> int:
        """Optimizer steps of the stage on `rows` training rows, as transformers' `Trainer` counts them.

        Where TRL packs rows into sequences (`packing`) their number is smaller than `rows`.
        """
        per_epoch = steps_per_epoch(
            rows, self.train["per_device_train_batch_size"] * processes, self.train["gradient_accumulation_steps"],
            drop_last=self.train["dataloader_drop_last"],
        )  # fmt: skip
        return total_steps(per_epoch, self.train["num_train_epochs"], self.train["max_steps"])


def steps_per_epoch(rows: int, batch_size: int, accumulation: int, *, drop_last: bool = False) -> int:
    """Optimizer steps of an epoch, the last of which may have fewer rows.

    Args:
        batch_size: Rows in a batch, over all processes.
        accumulation: Batches in a step.
        drop_last: Leave out a last batch that is not full.
    """
    batches = rows // batch_size if drop_last else math.ceil(rows / batch_size)
    return max(math.ceil(batches / accumulation), 1)


def total_steps(per_epoch: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a training; `max_steps`, where it is positive, takes precedence over `epochs`."""
    return max_steps if max_steps > 0 else math.ceil(per_epoch * epochs)


def resolve_stages(recipe: Recipe) -> list[ResolvedStage]:
    """The stages as they are trained, in order: a stage of several rounds is several."""
    resolved: list[ResolvedStage] = []
    stack: tuple[str, ...] = ()
    for stage in recipe.stages:
        for index, name in enumerate(stage.round_names):
            following = stage.round_names[index + 1 :]
            replaces = stack[-1] if stage.continue_adapter and index else None
            below = stack[:-1] if replaces else stack
            resolved.append(
                ResolvedStage(
                    name=name,
                    type=stage.type,
                    section=stage.name,
                    source=stage.source,
                    feedback=stage.feedback,
                    overflow=stage.overflow,
                    lora=recipe.lora.model_copy(update=stage.lora.model_dump(exclude_none=True)),
                    given=stage.train,
                    below=below,
                    replaces=replaces,
                    replaced_by=following[0] if stage.continue_adapter and following else None,
                    samples_from=_sampled(stage.feedback, index, stack),
                )
            )
            stack = (*below, name)
    return resolved


def stage_names(recipe: Recipe) -> list[str]:
    """Every name that results go under: `base`, then each stage as it is trained."""
    return ["base", *(stage.name for stage in resolve_stages(recipe))]


def _sampled(feedback: FeedbackSource | None, index: int, stack: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters that are sampled from: those of the stack so far, or up to the stage that the recipe names."""
    named = feedback.sample.from_stage if feedback is not None and feedback.sample is not None else None
    if named is None or index > 0:  # every round but the first samples from the round before
        return stack
    return () if named == "base" else stack[: stack.index(named) + 1]
