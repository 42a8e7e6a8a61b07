"""The stages of a recipe as they are trained: one entry per round, with defaults and with the adapters below.

`Recipe` is what the user wrote. Everything that runs, plans, checks or describes a stage calls `resolve_stages` and
reads the `ResolvedStage`s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tuna_peft.data.config import DataSource, Overflow
from tuna_peft.recipe.feedback_schema import FeedbackSource
from tuna_peft.recipe.schema import LoraSettings, Recipe, StageType
from tuna_peft.recipe.train_fields import train_fields


@dataclass(frozen=True)
class ResolvedStage:
    """The training of one adapter.

    Attributes:
        name: Name of the adapter and of its folder; the rounds of a stage are NAME-1, NAME-2 ...
        type: `sft` or `ranking`.
        section: The stage's name in the recipe, the same for all of its rounds.
        source: The data set to read: training examples, or the prompts whose responses the run ranks.
        feedback: How the run ranks the responses itself; None if `source` holds the training examples.
        overflow: Truncation policy for responses that exceed `max_length`.
        lora: LoRA settings: the recipe's, with the stage's overrides.
        train_overrides: The fields of the trainer's configuration that the recipe sets.
        below: The frozen adapters that this one is trained on top of, from bottom to top.
        replaces: With `continue_adapter`, the adapter of the stage or round before: this one starts from its weights
            and replaces it in the stack. Not in `below`.
        replaced_by: The next stage or round, if it continues this adapter and replaces it.
        samples_from: The adapters that are active while responses are sampled, from bottom to top; empty for the base.
    """

    name: str
    type: StageType
    section: str
    source: DataSource
    feedback: FeedbackSource | None
    overflow: Overflow
    lora: LoraSettings
    train_overrides: dict[str, Any]
    below: tuple[str, ...] = ()
    replaces: str | None = None
    replaced_by: str | None = None
    samples_from: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The stage's dotted key in the recipe, for error messages and overrides."""
        return f"stages.{self.section}"

    @property
    def generated(self) -> tuple[int, int] | None:
        """What the run's model or the teacher's server generates: `(responses per prompt, maximum tokens of each)`.

        None if nothing is generated, because `source` holds the responses.
        """
        if self.feedback is None:
            return None
        if (sample := self.feedback.sample) is not None:
            return sample.n, sample.max_new_tokens
        generate = self.feedback.score and self.feedback.score.generate
        return (generate.n, generate.max_tokens) if generate else None

    @cached_property
    def train(self) -> dict[str, Any]:
        """Every field of the trainer's configuration: the recipe's value, or else the default. Imports torch."""
        return {name: field.default for name, field in train_fields(self.type).items()} | self.train_overrides

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step of one process."""
        return int(self.train["per_device_train_batch_size"] * self.train["gradient_accumulation_steps"])

    @property
    def max_length(self) -> int | None:
        """Maximum length of a prompt with one response, in tokens; None is the model's context length."""
        return self.train["max_length"]

    @property
    def needs_reference(self) -> bool:
        """Whether every example needs a reference response."""
        return self.train.get("mle_on") == "reference"

    @property
    def needs_scores(self) -> bool:
        """Whether every example needs scores, because its loss uses more than ranks. Imports torch."""
        from tuna_peft.training.combinations import needs_scores

        options = ("loss_type", "margin_by", "pair_weight")
        return self.type == "ranking" and needs_scores(*(self.train[name] for name in options))

    @property
    def has_lists(self) -> bool:
        """Whether its data is ranked lists, some of which `evaluation: auto` holds back: also that of SFT on the best
        response of lists that the run ranks itself."""
        return self.type == "ranking" or self.feedback is not None

    @property
    def measured_margin(self) -> float:
        """The margin by which its lists are measured: that of the loss, or the default if it is `auto` or SFT."""
        margin = self.train.get("margin", "auto")
        return train_fields("ranking")["margin"].default if margin == "auto" else margin

    def is_auto(self, field: str) -> bool:
        """Whether the recipe leaves the choice of a number to the trainer."""
        return self.train_overrides.get(field) == "auto"

    @property
    def checkpoints_activations(self) -> bool:
        """Whether gradient checkpointing is on. transformers 5 renamed the field; recipes may use either name."""
        given = self.train_overrides
        return given.get("activation_checkpointing", given.get("gradient_checkpointing", True))

    def update_steps(self, rows: int, processes: int = 1) -> int:
        """Number of optimizer steps for `rows` training examples, as transformers' `Trainer` counts them.

        With TRL's `packing` the trainer gets fewer, longer sequences than there are examples, and takes fewer steps.
        """
        per_epoch = steps_per_epoch(
            rows, self.train["per_device_train_batch_size"] * processes, self.train["gradient_accumulation_steps"],
            drop_last=self.train["dataloader_drop_last"],
        )  # fmt: skip
        return total_steps(per_epoch, self.train["num_train_epochs"], self.train["max_steps"])


def steps_per_epoch(rows: int, batch_size: int, accumulation: int, *, drop_last: bool = False) -> int:
    """Number of optimizer steps in an epoch; the last step may see fewer examples than the others.

    Args:
        rows: Number of training examples.
        batch_size: Examples per batch, over all processes.
        accumulation: Batches per optimizer step (gradient accumulation).
        drop_last: Drop the last batch if it is not full.
    """
    batches = rows // batch_size if drop_last else math.ceil(rows / batch_size)
    return max(math.ceil(batches / accumulation), 1)


def total_steps(per_epoch: int, epochs: float, max_steps: int) -> int:
    """Number of optimizer steps of a training; a positive `max_steps` takes precedence over `epochs`."""
    return max_steps if max_steps > 0 else math.ceil(per_epoch * epochs)


def resolve_stages(recipe: Recipe) -> list[ResolvedStage]:
    """The stages in the order of training; a stage with several rounds gives one entry for each."""
    resolved: list[ResolvedStage] = []
    stack: tuple[str, ...] = ()
    for stage in recipe.stages:
        for index, name in enumerate(stage.round_names):
            replaces = stack[-1] if stage.continues_stage or (stage.continue_adapter and index) else None
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
                    train_overrides=stage.train,
                    below=below,
                    replaces=replaces,
                    samples_from=_samples_from(stage.feedback, index, stack),
                )
            )
            if replaces:
                resolved[-2] = replace(resolved[-2], replaced_by=name)
            stack = (*below, name)
    return resolved


def stage_names(recipe: Recipe) -> list[str]:
    """The names of everything that is evaluated: `base`, then each stage (each round) in the order of training."""
    return ["base", *(stage.name for stage in resolve_stages(recipe))]


def _samples_from(feedback: FeedbackSource | None, index: int, stack: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters to sample from: the whole stack so far, or up to the stage that the recipe names."""
    named = feedback.sample.from_stage if feedback is not None and feedback.sample is not None else None
    if named is None or index > 0:  # every round after the first samples from the round before
        return stack
    return () if named == "base" else stack[: stack.index(named) + 1]
