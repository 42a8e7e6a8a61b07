"""What `auto` means in evaluations and in `tuna-peft sample`, `score` and `judge`: sizes by the formulas of the plan.

A size is fixed in the journal, because batches of other sizes round differently: what is resumed with more or less
free memory computes as it began.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tuna_peft.data.ranked import Record
from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import JudgeSettings, LocalModelSettings, SampleSettings, ScoreSettings, Size
from tuna_peft.journal import Journal
from tuna_peft.limits import UNPLANNED_BATCH, UNPLANNED_QUESTIONS, UNPLANNED_TOKENS
from tuna_peft.planning.from_recipe import judge_spec, local_model, this_device
from tuna_peft.planning.lengths import records_workload
from tuna_peft.planning.memory import Precision
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.sizes import scored_tokens, sequences, sized_judge
from tuna_peft.planning.workload import Row, Workload

if TYPE_CHECKING:
    import torch

    from tuna_peft.evaluation.session import BatchSize

logger = logging.getLogger("tuna_peft")


def batch_size(setting: Size, model: torch.nn.Module) -> int | BatchSize:
    """Number of prompts in a batch of an evaluation of the loaded `model`; for `auto`, how each task finds its own."""
    import torch

    from tuna_peft.models.base.shards import is_sharded
    from tuna_peft.models.forward.scoring import without_peft
    from tuna_peft.models.stack.files import quantization_method, quantization_of

    if setting != "auto":
        return setting
    plain = without_peft(model)

    def size(rows: Sequence[tuple[int, Sequence[int]]], new_tokens: int | None) -> int:
        if is_sharded(model):  # its weights gather for each layer, which no plan counts
            return UNPLANNED_BATCH
        try:
            shape = ModelShape.from_config(plain.config.to_dict(), plain.name_or_path)
            precision = Precision(quantization_method(quantization_of(plain)), False, plain.dtype.itemsize)
        except UserError as error:
            logger.debug("no plan of the batch size: %s", error.what)
            return UNPLANNED_BATCH
        here = this_device(str(plain.device))
        fixed = torch.cuda.memory_allocated(plain.device) if here.cuda else 0.0
        workload = Workload(tuple(Row(prompt, tuple(responses)) for prompt, responses in rows), len(rows), "")
        return sequences(shape, precision, fixed, here, workload, new_tokens)

    return size


def sized_sampling(
    settings: SampleSettings, model: str, quantization: str, prompts: Sequence[Record], journal: Journal, device: str
) -> SampleSettings:
    """The settings with a batch size for `model`, which is loaded already."""
    if settings.batch_size != "auto" or settings.server is not None or settings.backend != "transformers":
        return settings

    def plan() -> int:
        here = this_device(device)
        wanted = LocalModelSettings.model_validate({"model": model, "quantization": quantization})
        known = local_model(wanted, here, "MODEL")
        assert known is not None
        # A GPU's memory includes what this process has taken already; a CPU's does not.
        fixed = sum(known.parts.values()) if here.cuda else 0.0
        asked = _workload(prompts)
        return sequences(known.shape, known.precision, fixed, here, asked, settings.max_new_tokens, settings.n)

    size = _settled(journal, "batch_size", plan, UNPLANNED_BATCH)
    return settings.model_copy(update={"batch_size": size})


def sized_scoring(settings: ScoreSettings, rows: Sequence[Record], journal: Journal, device: str) -> ScoreSettings:
    """The settings with a number of tokens for a local teacher, which is not loaded yet."""
    if settings.max_tokens_per_batch != "auto" or settings.model is None:
        return settings

    def plan() -> int:
        here = this_device(device)
        teacher = local_model(settings, here, "--model")
        assert teacher is not None
        return scored_tokens(teacher, 0.0, here, _workload(rows))

    tokens = _settled(journal, "max_tokens_per_batch", plan, UNPLANNED_TOKENS)
    return settings.model_copy(update={"max_tokens_per_batch": tokens})


def sized_judging(settings: JudgeSettings, rows: Sequence[Record], journal: Journal, device: str) -> JudgeSettings:
    """The settings with a number of questions for a local judge, which is not loaded yet."""
    if settings.batch_size != "auto" or settings.model is None:
        return settings

    def plan() -> int:
        here = this_device(device)
        judge = judge_spec(settings, _workload(rows), here, "--model")
        assert judge is not None
        return sized_judge(judge, 0.0, here).batch_size

    size = _settled(journal, "batch_size", plan, UNPLANNED_QUESTIONS)
    return settings.model_copy(update={"batch_size": size})


def _workload(rows: Sequence[Record]) -> Workload:
    return records_workload(rows, None)  # by characters, an upper bound: the tokenizer is not loaded


def _settled(journal: Journal, name: str, plan: Callable[[], int], unplanned: int) -> int:
    """What `plan` finds, or the journal has; `unplanned` for a model that the planner does not know."""
    try:
        size = plan()
    except UserError as error:  # loading the model gives the error, if it is one
        logger.debug("no plan of %s: %s", name, error.what)
        size = unplanned
    settled = journal.settle(name, size, before=unplanned)
    logger.info("%s: %d", name, settled)
    return int(settled)
