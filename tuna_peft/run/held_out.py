"""`evaluation: auto`: some prompts of the stages with ranked lists are held back from training and measured instead.

`tuna_peft.run.inputs` calls it. The choice depends on the prompts and the seed only, not on the order of a file, and a
prompt that is held back is trained on in no stage. A stage whose responses the run ranks itself samples and ranks
those of its held-back prompts, too; they are measured from then on, also on the stages before.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from datasets import Dataset, concatenate_datasets

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.load import Placed
from tuna_peft.data.ranked import Record
from tuna_peft.errors import UserError
from tuna_peft.journal import content_key
from tuna_peft.recipe.evaluation_schema import AUTO_ANSWERS, AUTO_NEW_TOKENS, held_out_size
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.run.tasks import Task, answers_task, ranking_task

logger = logging.getLogger("tuna_peft")
Item = TypeVar("Item")


@dataclass
class HeldOut:
    """The prompts that are held back.

    Attributes:
        prompts: Their hashes.
        records: The records to measure with their places, by the stage whose ranked data they are from, without empty
            lists. Those of a stage that ranks responses itself are prompts.
    """

    prompts: set[str] = field(default_factory=set)
    records: dict[str, list[Placed]] = field(default_factory=dict)

    def training(self, stage: ResolvedStage, placed: Iterable[Placed]) -> Iterator[Placed]:
        """The training examples of a stage, without the prompts that are held back."""
        return self._kept(stage, placed, lambda item: item[1])

    def measured(self, stage: ResolvedStage, placed: Iterable[Placed]) -> Iterator[Placed]:
        """The ranked examples of a stage to measure; `placed` is read only if the run has ranked them itself."""
        if stage.feedback is None:
            return iter(self.records[stage.name])
        chosen = self._measured(stage)
        return (item for item in placed if _key(item[1]) in chosen)

    def to_rank(self, stage: ResolvedStage, rows: list[Record]) -> list[Record]:
        """The prompts of a stage that ranks responses itself: to train on and to measure, in the order of `rows`."""
        kept, chosen = set(self._kept(stage, range(len(rows)), rows.__getitem__)), self._measured(stage)
        return [row for index, row in enumerate(rows) if index in kept or _key(row) in chosen]

    def _measured(self, stage: ResolvedStage) -> set[str]:
        return {_key(record) for _, record in self.records.get(stage.name, ())}

    def _kept(self, stage: ResolvedStage, items: Iterable[Item], record: Callable[[Item], Record]) -> Iterator[Item]:
        items = iter(items)
        if self.prompts:
            # Until there are enough for a step it is not known whether any prompt can be spared.
            waiting: list[tuple[Item, bool]] = []
            needed = stage.examples_per_step
            for item in items:
                waiting.append((item, _key(record(item)) not in self.prompts))
                needed -= waiting[-1][1]
                if needed <= 0:
                    break
            if spared := needed > 0 and not all(kept for _, kept in waiting):
                logger.warning("stage %s trains on prompts that are held back elsewhere: too few others", stage.name)
            yield from (item for item, kept in waiting if kept or spared)
        yield from (item for item in items if not self.prompts or _key(record(item)) not in self.prompts)


def hold_out(stages: Sequence[ResolvedStage], read: Callable[[ResolvedStage], Iterable[Placed]], seed: int) -> HeldOut:
    """Chooses the prompts to hold back from the data of the stages with ranked lists, and says how many.

    Args:
        stages: The stages of the recipe.
        read: Reads the records of such a stage, or its prompts; called twice, as they may be too many to keep.
        seed: That of the recipe.
    """
    held = HeldOut()
    ranking = [stage for stage in stages if stage.has_lists]
    keys: dict[str, list[str]] = {}  # of the prompts
    for stage in ranking:
        keys[stage.name] = [_key(record) for _, record in read(stage)]
        # Hashed with the seed: the same prompt comes early or late in the data of every stage.
        order = sorted(set(keys[stage.name]), key=lambda key: content_key(seed=seed, prompt=key))
        held.prompts |= set(order[: held_out_size(len(order), stage.examples_per_step)])
    measured: set[str] = set()
    # Data that is ranked already comes first: it can be measured before the first stage.
    for stage in sorted(ranking, key=lambda stage: stage.feedback is not None):
        new = held.prompts.intersection(keys[stage.name]) - measured
        measured |= new
        if new:
            held.records[stage.name] = [(where, record) for where, record in read(stage) if _key(record) in new]
            logger.info(
                "stage %s: %d of %d prompts are held back for the evaluation, by seed %d "
                "(`evaluation: null` trains on all)",
                stage.name, len(held.records[stage.name]), len(keys[stage.name]), seed,
            )  # fmt: skip
    if ranking and not measured:
        logger.info("evaluation: nothing is measured, because there are too few prompts to hold some back")
    return held


Encode = Callable[[ResolvedStage], Dataset]


def held_out_tasks(
    held_out: HeldOut,
    stages: Sequence[ResolvedStage],
    prompt: PromptConfig,
    context: int | None,
    encode: Encode,
) -> list[Task]:
    """The tasks `ranking` and `answers` on the prompts that are held back; `ranking` only where they are ranked.

    Args:
        stages: Gives the margin: that of the last stage that has prompts held back.
        prompt: The prompt template.
        context: The model's context length; answers take half of it at most.
        encode: Encodes the examples of `HeldOut.measured` of a stage. If none of them can be used, and the recipe
            says that such examples are skipped, the stage is removed from `held_out.records`.

    Raises:
        UserError: See `tuna_peft.data.load.encode_source`.
    """
    ranked = [stage for stage in stages if stage.name in held_out.records and stage.feedback is None]
    encoded = [rows for stage in ranked if (rows := _usable(held_out, stage, encode)) is not None]
    last = [stage for stage in ranked if stage.name in held_out.records][-1:]
    tasks = [ranking_task(concatenate_datasets(encoded), last[0].measured_margin)] if encoded else []
    chosen = sorted((record for placed in held_out.records.values() for _, record in placed), key=_key)
    if chosen:
        most = min(AUTO_NEW_TOKENS, (context or sys.maxsize) // 2)
        tasks.append(answers_task(chosen[:AUTO_ANSWERS], prompt, most))
    return tasks


def self_ranked_task(held_out: HeldOut, stage: ResolvedStage, tasks: Sequence[Task], encode: Encode) -> Task | None:
    """The task on the held-back prompts of a stage whose responses the run has ranked by now; None without any.

    Args:
        tasks: The tasks so far: the new one is called `ranking` if there is none yet, else `ranking-<stage>`.
        encode: See `held_out_tasks`.
    """
    if stage.name not in held_out.records or (rows := _usable(held_out, stage, encode)) is None:
        return None
    name = "ranking" if all(task.name != "ranking" for task in tasks) else f"ranking-{stage.name}"
    return ranking_task(rows, stage.measured_margin, name)


def _usable(held_out: HeldOut, stage: ResolvedStage, encode: Encode) -> Dataset | None:
    try:
        return encode(stage)
    except UserError as error:
        if stage.feedback is None and "skip" not in (stage.overflow, stage.source.on_bad_row):
            raise
        logger.warning("stage %s: nothing can be measured on its held-back prompts: %s", stage.name, error.what)
        del held_out.records[stage.name]
        return None


def _key(record: Record) -> str:
    return content_key(prompt=record["prompt"])
