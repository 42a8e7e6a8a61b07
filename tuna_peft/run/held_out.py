"""`evaluation: auto`: some prompts of the ranking stages' data are held back from training and measured instead.

`tuna_peft.run.inputs` calls it. The choice depends on the prompts and the seed only, not on the order of a file, and a
prompt that is held back is left out of every stage.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from datasets import Dataset, concatenate_datasets

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.load import Placed, iterate_ranked
from tuna_peft.data.ranked import ReadReport, Record
from tuna_peft.errors import UserError
from tuna_peft.journal import content_key
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.run.tasks import Task, answers_task, ranking_task

logger = logging.getLogger("tuna_peft")
Item = TypeVar("Item")

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
        records: The records to measure with their places, by the ranking stage whose data they are from, without empty
            lists.
    """

    prompts: set[str] = field(default_factory=set)
    records: dict[str, list[Placed]] = field(default_factory=dict)

    def training(self, stage: ResolvedStage, placed: Iterable[Placed]) -> Iterator[Placed]:
        """The training examples of a stage, without the prompts that are held back."""
        return self._kept(stage, placed, lambda item: item[1])

    def measured(self, stage: ResolvedStage, placed: Iterable[Placed]) -> Iterator[Placed]:
        """The examples of a ranking stage to measure; `placed` need not be read again."""
        return iter(self.records[stage.name])

    def without(self, stage: ResolvedStage, rows: list[Record]) -> list[Record]:
        """The prompts of a stage that ranks responses itself, without those that are held back."""
        return list(self._kept(stage, rows, lambda row: row))

    def _kept(self, stage: ResolvedStage, items: Iterable[Item], record: Callable[[Item], Record]) -> Iterator[Item]:
        items = iter(items)
        if self.prompts:
            # Until there are enough for a step it is not known whether any prompt can be spared.
            waiting: list[tuple[Item, bool]] = []
            needed = _needed(stage)
            for item in items:
                waiting.append((item, _key(record(item)) not in self.prompts))
                needed -= waiting[-1][1]
                if needed <= 0:
                    break
            if spared := needed > 0 and not all(kept for _, kept in waiting):
                logger.warning("stage %s trains on prompts that are held back elsewhere: too few others", stage.name)
            yield from (item for item, kept in waiting if kept or spared)
        yield from (item for item in items if not self.prompts or _key(record(item)) not in self.prompts)


def hold_out(stages: Sequence[ResolvedStage], prompt: PromptConfig, seed: int) -> HeldOut:
    """Chooses the prompts to hold back from the data of the ranking stages in `stages`, and says how many.

    None is held back from a stage whose responses the run ranks itself: they do not exist before the run.

    Raises:
        UserError: See `tuna_peft.data.load.load_ranked`.
    """
    held = HeldOut()
    own = [stage for stage in stages if stage.type == "ranking" and stage.feedback is None]
    keys: dict[str, list[str]] = {}  # of the prompts; the records themselves may be too many to keep
    for stage in own:
        placed = iterate_ranked(stage.source, prompt, ReadReport(), pairs=True)
        keys[stage.name] = [_key(record) for _, record in placed]
        # Hashed with the seed: the same prompt comes early or late in the data of every stage.
        order = sorted(set(keys[stage.name]), key=lambda key: content_key(seed=seed, prompt=key))
        held.prompts |= set(order[: held_out_size(len(order), _needed(stage))])
    measured: set[str] = set()
    for stage in own:
        new = held.prompts.intersection(keys[stage.name]) - measured
        measured |= new
        if new:
            placed = iterate_ranked(stage.source, prompt, ReadReport(), pairs=True)
            held.records[stage.name] = [(where, record) for where, record in placed if _key(record) in new]
            logger.info(
                "stage %s: %d of %d prompts are held back for the evaluation, by seed %d "
                "(`evaluation: null` trains on all)",
                stage.name, len(held.records[stage.name]), len(keys[stage.name]), seed,
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
    chosen = sorted((record for placed in held_out.records.values() for _, record in placed), key=_key)
    return [
        ranking_task(concatenate_datasets(encoded), last.train["margin"]),
        answers_task(chosen[:MAX_ANSWERS], prompt, min(MAX_NEW_TOKENS, (context or sys.maxsize) // 2)),
    ]


def _key(record: Record) -> str:
    return content_key(prompt=record["prompt"])


def _needed(stage: ResolvedStage) -> int:
    """Examples of one optimizer step."""
    return stage.train["per_device_train_batch_size"] * stage.train["gradient_accumulation_steps"]
