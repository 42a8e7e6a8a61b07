"""A recipe in the terms of `tuna_peft.planning`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuna_peft.data.config import DataSource
from tuna_peft.errors import UserError
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.hub_config import is_on_disk, read_shape
from tuna_peft.planning.memory import Adapter, Precision
from tuna_peft.planning.plan import (
    CUDA_CONTEXT,
    Device,
    EvaluationSpec,
    MergeSpec,
    Plan,
    RunSpec,
    StageSpec,
    TaskSpec,
    make_plan,
)
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ASSUMED_HELD_OUT, ASSUMED_RESPONSE, ASSUMED_RESPONSES, Row, Workload
from tuna_peft.ram import available_ram
from tuna_peft.recipe.evaluation_schema import RankingTask
from tuna_peft.recipe.feedback_schema import FeedbackSource
from tuna_peft.recipe.lengths import is_here, source_workload
from tuna_peft.recipe.schema import Recipe, Stage
from tuna_peft.recipe.train_fields import train_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("tuna_peft")

_MERGED_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "nf4": 0.6}


def plan_recipe(recipe: Recipe, devices: Sequence[Device]) -> tuple[list[Plan], str]:
    """The plans of a recipe on some devices, from the model's configuration and the data that is here; no weights.

    Returns:
        The plans, and where the model's sizes come from.

    Raises:
        UserError: No such model, one that cannot be reached or planned, data that cannot be used, bf16 on a single
            card without it.
    """
    if len(devices) == 1:
        require_native_bf16(recipe, devices[0].name, has_bf16=devices[0].bf16)
    shape, source = read_shape(recipe.base.model, recipe.base.revision)
    workloads = read_workloads(recipe, shape)
    plans = [make_plan(run_spec(recipe, shape, workloads, device), device) for device in devices]
    return plans, source


def this_device(setting: str = "auto") -> Device:
    """The GPU that a run would use, or this machine's main memory.

    Args:
        setting: As `base.device`.
    """
    import torch

    from tuna_peft.models.base import resolve_device

    device = resolve_device(setting)
    if device.type != "cuda":
        return Device("CPU", available_ram(), cuda=False)
    name, (free, _) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    try:
        gpu = find_gpu(name)
    except UserError:
        gpu = None
    # What is free, and what this process holds already, its context included.
    own = torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    return Device(name, free + own, gpu, bf16=torch.cuda.get_device_capability(device)[0] >= 8)


def read_workloads(recipe: Recipe, shape: ModelShape) -> dict[str, Workload]:
    """The lengths of all data of a recipe, by stage name and under `evaluation.<task>`."""
    tokenizer = _tokenizer(recipe) if any(map(is_here, recipe.sources().values())) else None
    workloads = {
        stage.name: _made_workload(stage.data, recipe, tokenizer)
        if isinstance(stage.data, FeedbackSource)
        else source_workload(
            stage.data, recipe, tokenizer,
            kind=stage.type, max_length=_longest(stage_value(stage, "max_length"), shape), overflow=stage.overflow,
        )
        for stage in recipe.trained()
    }  # fmt: skip
    for name, task in _tasks(recipe).items():
        options: dict[str, Any] = {"kind": "prompts"}
        if isinstance(task, RankingTask):
            options = {"kind": "ranking", "max_length": _longest(task.max_length, shape), "overflow": task.overflow}
        workloads[f"evaluation.{name}"] = source_workload(task, recipe, tokenizer, assumed=ASSUMED_HELD_OUT, **options)
    return workloads


def _made_workload(source: FeedbackSource, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> Workload:
    """Prompts with the longest responses that the run may draw to them; typical ones where they stand in a file."""
    prompts = source_workload(source.prompts, recipe, tokenizer, kind="prompts")
    n, longest = ASSUMED_RESPONSES, ASSUMED_RESPONSE
    if source.sample is not None:
        n, longest = source.sample.n, source.sample.max_new_tokens
    elif source.score is not None and source.score.generate is not None:
        n, longest = source.score.generate.n, source.score.generate.max_tokens
    rows = tuple(Row(row.prompt, (longest,) * n) for row in prompts.rows)
    return Workload(rows, prompts.total, f"{prompts.source}, with {n} responses of up to {longest} tokens each")


def run_spec(
    recipe: Recipe, shape: ModelShape, workloads: dict[str, Workload], device: Device, processes: int = 1
) -> RunSpec:
    """What the arithmetic needs of a recipe.

    Args:
        workloads: As `read_workloads` gives them; a task without one is left out.
        device: Decides what is computed in, and by which attention kernel.
        processes: GPUs that share each step.
    """
    wide = not device.cuda or recipe.base.dtype == "float32"
    quantization = recipe.quantization
    precision = Precision(
        quantization.method, quantization.double_quant, 4 if wide else 2, flash=device.bf16 and not wide
    )
    merge = recipe.export.merge
    tasks = {
        name: TaskSpec(workloads[key], getattr(task, "max_new_tokens", None))
        for name, task in _tasks(recipe).items()
        if (key := f"evaluation.{name}") in workloads
    }
    return RunSpec(
        recipe.base.model,
        shape,
        precision,
        tuple(_stage(recipe, stage, shape, workloads[stage.name], processes) for stage in recipe.trained()),
        EvaluationSpec(recipe.evaluation.batch_size, tasks) if recipe.evaluation else None,
        MergeSpec(_MERGED_BYTES[merge.dtype]) if merge.enabled else None,
        downloads=not is_on_disk(recipe.base.model, recipe.base.revision),
    )


def _tasks(recipe: Recipe) -> dict[str, DataSource]:
    """The evaluation's tasks that have data of their own, by name."""
    given = recipe.evaluation.tasks.given() if recipe.evaluation else {}
    return {name: task for name, task in given.items() if isinstance(task, DataSource)}


def _stage(recipe: Recipe, stage: Stage, shape: ModelShape, workload: Workload, processes: int) -> StageSpec:
    lora = recipe.lora_of(stage)
    targets = list(shape.linears) if lora.target_modules == "all-linear" else lora.target_modules
    recomputing = stage.train.get("activation_checkpointing", stage.train.get("gradient_checkpointing", True))
    policy = stage_value(stage, "activation_memory") if stage.type == "ranking" else "none"
    return StageSpec(
        stage.name,
        stage.type,
        workload,
        Adapter(lora.r, shape.adapter(lora.r, targets), len(targets), lora.dropout),
        batch_size=stage_value(stage, "per_device_train_batch_size"),
        accumulation=stage_value(stage, "gradient_accumulation_steps"),
        max_tokens=stage.train.get("max_tokens_per_batch"),
        activation_memory=policy if recomputing else "full",
        optimizer=str(stage_value(stage, "optim")),
        epochs=stage_value(stage, "num_train_epochs"),
        max_steps=stage_value(stage, "max_steps"),
        processes=processes,
        continues=stage.continue_adapter,
    )


def stage_value(stage: Stage, key: str) -> Any:
    """A field of `train`, or the trainer's default for it."""
    return stage.train.get(key, train_fields(stage.type)[key].default)


def require_native_bf16(recipe: Recipe, device: str, *, has_bf16: bool) -> None:
    """Refuses bf16 on a GPU that only emulates it.

    Raises:
        UserError: Names the first key that asks for it.
    """
    if has_bf16:
        return
    asked: dict[str, Any] = {
        "base.dtype": recipe.base.dtype,
        "quantization.compute_dtype": recipe.quantization.compute_dtype,
        **{f"stages.{stage.name}.train.bf16": stage.train.get("bf16") for stage in recipe.trained()},
    }
    for key, value in asked.items():
        if value in ("bfloat16", True):
            raise UserError(
                f"the {device} has no bf16, and `{key}` asks for it",
                where=key,
                fix="Leave the key out: dtypes follow the GPU by themselves (fp16 here, with fp32 adapters).",
            )


def _longest(max_length: int | None, shape: ModelShape) -> int | None:
    return min((length for length in (max_length, shape.context) if length is not None), default=None)


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, where it can be had; a plan goes on without it."""
    from transformers import AutoTokenizer

    from tuna_peft.models.base import resolve_model_path

    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(recipe.base.model), revision=recipe.base.revision)
    except (OSError, ValueError):
        logger.warning("%s: its tokenizer cannot be read; lengths are counted in characters", recipe.base.model)
        return None
