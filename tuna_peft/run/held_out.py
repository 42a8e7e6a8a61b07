"""`evaluation: auto`: some prompts of the ranking stages' data are held back from training and measured instead.

`tuna_peft.run.inputs` calls it. The choice depends on the prompts and the seed only, not on the order of a file, and a
prompt that is held back is left out of every stage.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from datasets import Dataset, concatenate_datasets

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.load import Placed, read_ranked
from tuna_peft.data.ranked import Record
from tuna_peft.errors import UserError
from tuna_peft.journal import content_key
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.run.tasks import Task, answers_task, ranking_task

logger = logging.getLogger("tuna_peft")

BATCH_SIZE = 8
"""Prompts per batch in the evaluation; batches that run out of memory are split."""

MAX_ANSWERS, MAX_NEW_TOKENS = 20, 128
"""Maximum number of prompts that the model answers, and maximum length of an answer in tokens."""


def held_out_size(prompts: int, needed: int) -> int:
    """Number of prompts to hold back: 5 %, but 20 if there are 200, and 10 % of fewer.

    Args:
        prompts: Number of different prompts.
        needed: Number of prompts that training must keep.
    """
    return max(0, min(max(round(0.05 * prompts), min(20, prompts // 10)), prompts - needed))


@dataclass
class HeldOut:
    """The prompts that are held back.

    Attributes:
        prompts: Their hashes.
        records: The records to measure, by the ranking stage whose data they are from, without empty lists.
    """

    prompts: set[str] = field(default_factory=set)
    records: dict[str, list[Record]] = field(default_factory=dict)

    def training(self, stage: ResolvedStage, placed: list[Placed]) -> list[Placed]:
        """The training examples of a stage, without the prompts that are held back."""
        return [placed[index] for index in self._kept(stage, [record for _, record in placed])]

    def measured(self, stage: ResolvedStage, placed: list[Placed]) -> list[Placed]:
        """The examples of a ranking stage to measure."""
        chosen = {_key(record) for record in self.records[stage.name]}
        return [(where, record) for where, record in placed if _key(record) in chosen]

    def without(self, stage: ResolvedStage, rows: list[Record]) -> list[Record]:
        """The prompts of a stage that ranks responses itself, without those that are held back."""
        return [rows[index] for index in self._kept(stage, rows)]

    def _kept(self, stage: ResolvedStage, records: list[Record]) -> Sequence[int]:
        if not self.prompts:
            return range(len(records))
        kept = [index for index, record in enumerate(records) if _key(record) not in self.prompts]
        if len(kept) < min(_needed(stage), len(records)):
            logger.warning("stage %s trains on prompts that are held back elsewhere: too few others", stage.name)
            return range(len(records))
        return kept


def hold_out(stages: Sequence[ResolvedStage], prompt: PromptConfig, seed: int) -> HeldOut:
    """Chooses the prompts to hold back from the data of the ranking stages in `stages`, and says how many.

    None is held back from a stage whose responses the run ranks itself: they do not exist before the run.

    Raises:
        UserError: See `tuna_peft.data.load.load_ranked`.
    """
    held = HeldOut()
    own = [stage for stage in stages if stage.type == "ranking" and stage.feedback is None]
    read: dict[str, list[tuple[str, Record]]] = {}  # with the key of each record's prompt
    for stage in own:
        records, _ = read_ranked(stage.source, prompt)
        read[stage.name] = [(_key(record), record) for record in records]
        # Hashed with the seed: the same prompt comes early or late in the data of every stage.
        order = sorted({key for key, _ in read[stage.name]}, key=lambda key: content_key(seed=seed, prompt=key))
        held.prompts |= set(order[: held_out_size(len(order), _needed(stage))])
    measured: set[str] = set()
    for stage in own:
        new = held.prompts.intersection(key for key, _ in read[stage.name]) - measured
        measured |= new
        if new:
            held.records[stage.name] = [record for key, record in read[stage.name] if key in new]
            logger.info(
                "stage %s: %d of %d prompts are held back for the evaluation, by seed %d "
                "(`evaluation: null` trains on all)",
                stage.name, len(held.records[stage.name]), len(read[stage.name]), seed,
            )  # fmt: skip
    if own and not measured:
        logger.info("evaluation: nothing is measured, because there are too few prompts to hold some back")
    return held


def held_out_tasks(
    held_out: HeldOut,
    stages: Sequence[ResolvedStage],
    prompt: PromptConfig,
    context: int | None,
    encode: Callable[[ResolvedStage], Dataset],
) -> list[Task]:
    """The tasks `ranking` and `answers` on the prompts that are held back.

    Args:
        stages: Gives the margin: that of the last stage that has prompts held back.
        prompt: The prompt template.
        context: The model's context length; answers take half of it at most.
        encode: Encodes the examples of `HeldOut.measured` of a stage. If none of them can be used, and the recipe
            says that such examples are skipped, the stage is removed from `held_out.records`.

    Raises:
        UserError: See `tuna_peft.data.load.encode_source`.
    """
    encoded = []
    for stage in [stage for stage in stages if stage.name in held_out.records]:
        try:
            encoded.append(encode(stage))
        except UserError as error:
            if "skip" not in (stage.overflow, stage.source.on_bad_row):
                raise
            logger.warning("stage %s: nothing can be measured on its held-back prompts: %s", stage.name, error.what)
            del held_out.records[stage.name]
    if not encoded:
        return []
    last = [stage for stage in stages if stage.name in held_out.records][-1]
    chosen = sorted((record for records in held_out.records.values() for record in records), key=_key)
    return [
        ranking_task(concatenate_datasets(encoded), last.train["margin"]),
        answers_task(chosen[:MAX_ANSWERS], prompt, min(MAX_NEW_TOKENS, (context or sys.maxsize) // 2)),
    ]


def _key(record: Record) -> str:
    return content_key(prompt=record["prompt"])


def _needed(stage: ResolvedStage) -> int:
    """Examples of one optimizer step."""
    return stage.train["per_device_train_batch_size"] * stage.train["gradient_accumulation_steps"]
