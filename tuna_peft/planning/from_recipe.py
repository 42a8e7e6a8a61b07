"""Plans of a recipe: reads what `spec.RunSpec` needs from the recipe, the model's configuration and the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import JudgeSettings, LocalModelSettings
from tuna_peft.limits import UNPLANNED_BATCH, available_ram, is_ampere_or_later
from tuna_peft.models.stack.any_model import local_stack
from tuna_peft.models.stack.files import quantization_method
from tuna_peft.models.stack.manifest import read_manifest
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.hub_config import is_on_disk, read_shape
from tuna_peft.planning.lengths import questions, ranked_workload, read_workloads
from tuna_peft.planning.memory import CUDA_CONTEXT, Adapter, Precision
from tuna_peft.planning.plan import Plan, make_plan
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.spec import (
    Device,
    JudgeSpec,
    LocalModel,
    MergeSpec,
    RunSpec,
    SampleSpec,
    StageSpec,
    TaskSpec,
    TeacherSpec,
)
from tuna_peft.planning.workload import Row, Workload
from tuna_peft.recipe.evaluation_schema import (
    AUTO_ANSWERS,
    AUTO_NEW_TOKENS,
    VicunaTask,
    held_out_size,
)
from tuna_peft.recipe.export_notes import export_notes
from tuna_peft.recipe.feedback_schema import FeedbackSource
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages
from tuna_peft.recipe.schema import Recipe

_MERGED_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "nf4": 0.6, "int8": 1.1}


def plan_recipe(recipe: Recipe, devices: Sequence[Device]) -> tuple[list[Plan], str]:
    """Plans a recipe on some devices; reads the model's configuration and the data, but no weights.

    Returns:
        The plans, and where the model's sizes come from, in words.

    Raises:
        UserError: The model does not exist, cannot be reached or is not supported; data cannot be used; or the recipe
            requires bf16 and the only device does not support it.
    """
    if len(devices) == 1:
        require_native_bf16(recipe, devices[0].name, has_bf16=devices[0].bf16 or not devices[0].cuda)
    shape, source = read_shape(recipe.base.model, recipe.base.revision)
    workloads = read_workloads(recipe, shape)
    plans = [make_plan(run_spec(recipe, shape, workloads, device), device) for device in devices]
    return plans, source


def this_device(setting: str = "auto", *, timed: bool = False) -> Device:
    """The GPU that a run would use, or the CPU with this machine's free memory.

    Args:
        setting: The recipe's `base.device`.
        timed: Whether to measure for a second how fast a CPU is; without it, its hours are unknown.
    """
    import torch

    from tuna_peft.models.base.cpu_bf16 import cpu_bf16
    from tuna_peft.models.base.load import resolve_device
    from tuna_peft.planning.cpu_speed import cpu_speed

    device = resolve_device(setting)
    if device.type != "cuda":
        bf16, why = cpu_bf16()
        speed = cpu_speed(torch.bfloat16 if bf16 else torch.float32) if timed else None
        return Device("CPU", available_ram(), speed, cuda=False, bf16=bf16, why=why)
    name, (free, _) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    try:
        gpu = find_gpu(name)
    except UserError:
        gpu = None
    # Free memory, and what this process has reserved already, its CUDA context included.
    own = torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    return Device(name, free + own, gpu, bf16=is_ampere_or_later(torch.cuda.get_device_capability(device)))


def run_spec(
    recipe: Recipe,
    shape: ModelShape,
    workloads: dict[str, Workload],
    device: Device,
    processes: int = 1,
    ranked: Container[str] = (),
) -> RunSpec:
    """What the planner needs to know of a recipe.

    Args:
        recipe: The recipe.
        shape: The sizes of its base model.
        workloads: See `read_workloads`; an evaluation task without one is not planned.
        device: Determines the compute dtype and the attention kernel.
        processes: GPUs that share each optimizer step.
        ranked: Stages whose training data is ranked already.

    Raises:
        UserError: A local teacher or judge cannot be found or is not supported.
    """
    dtype = recipe.base.dtype
    size = device.compute_bytes(shape) if dtype == "auto" else 4 if dtype == "float32" else 2
    quantization = recipe.quantization
    flash = device.bf16 and device.cuda and size == 2
    precision = Precision(quantization.method, quantization.double_quant, size, flash=flash)
    export = recipe.export
    stages = tuple(
        _stage(stage, shape, workloads[stage.name], device, processes, ranked=stage.name in ranked)
        for stage in resolve_stages(recipe)
    )
    compared = workloads.get("evaluation.ranking", stages[-1].workload)
    exported = export.merge.enabled or export.combine
    run = RunSpec(
        recipe.base.model,
        shape,
        precision,
        stages,
        _named_evaluation(recipe, workloads, device),
        MergeSpec(_MERGED_BYTES[export.merge.dtype], tuple(export.gguf)) if export.merge.enabled else None,
        compared=_longest(compared, export.divergence_prompts) if exported else (),
        downloads=not is_on_disk(recipe.base.model, recipe.base.revision),
        unplanned=tuple(_unplanned(recipe)),
        export_notes=tuple(export_notes(recipe)),
    )
    if recipe.evaluation == "auto":
        return dataclasses.replace(run, evaluation=_auto_evaluation(run, resolve_stages(recipe)))
    return run


def _auto_evaluation(run: RunSpec, stages: Sequence[ResolvedStage]) -> dict[str, TaskSpec]:
    """The tasks of `evaluation: auto`. Stages on the same data hold the same prompts back, which count once."""
    measured: dict[str, tuple[Workload, int]] = {}
    for stage, planned in zip(stages, run.stages, strict=True):
        if stage.has_lists:
            # SFT trains on the best response of a list, and all of them are measured.
            lists = (stage.type == "sft" and planned.prompt_workload) or planned.workload
            held_out = held_out_size(lists.total, stage.examples_per_step)
            measured.setdefault(stage.source.model_dump_json(), (lists, held_out))
    total = sum(count for _, count in measured.values())
    if not total:
        return {}
    rows = tuple(row for workload, count in measured.values() if count for row in workload.rows)
    ranked = Workload(rows, total, f"{total:,} prompts held back")
    asked = dataclasses.replace(ranked, total=min(total, AUTO_ANSWERS))
    new_tokens = min(AUTO_NEW_TOKENS, (run.shape.context or AUTO_NEW_TOKENS * 2) // 2)
    return {"ranking": TaskSpec(ranked, auto=True), "answers": TaskSpec(asked, new_tokens, auto=True)}


def _stage(
    stage: ResolvedStage, shape: ModelShape, workload: Workload, device: Device, processes: int, *, ranked: bool
) -> StageSpec:
    """The stage; `ranked` says whether its training data is ranked already."""
    lora, train = stage.lora, stage.train
    targets = list(shape.linears) if lora.target_modules == "all-linear" else lora.target_modules
    policy = train.get("activation_memory", "none")
    auto_tokens = train.get("max_tokens_per_batch") == "auto"
    models: dict[str, Any] = {}
    if stage.feedback is not None:
        if not ranked:
            key = f"{stage.key}.data"
            models = {"prompt_workload": workload, **_ranking_models(stage.feedback, workload, device, key)}
        workload = ranked_workload(stage, workload)
    return StageSpec(
        stage.name,
        stage.type,
        workload,
        Adapter(lora.r, shape.adapter(lora.r, targets), len(targets), lora.dropout),
        batch_size=train["per_device_train_batch_size"],
        accumulation=train["gradient_accumulation_steps"],
        max_tokens=None if auto_tokens else train.get("max_tokens_per_batch"),
        auto_tokens=auto_tokens,
        activation_memory=policy if stage.checkpoints_activations else "full",
        optimizer=str(train["optim"]),
        epochs=train["num_train_epochs"],
        max_steps=train["max_steps"],
        processes=processes,
        continues=stage.replaces is not None,
        reference=train.get("reference") == "below",
        section=stage.section,
        **models,
    )


def _ranking_models(source: FeedbackSource, rows: Workload, device: Device, key: str) -> dict[str, Any]:
    """The local models that sample and rank; a server or a Python function needs no memory on this machine."""
    models: dict[str, Any] = {}
    if (sample := source.sample) is not None and sample.backend == "transformers" and not sample.server:
        models["sample"] = SampleSpec(
            sample.n, sample.max_new_tokens, sample.responses_at_once, sample.top_p < 1,
            attempts=sample.trials if sample.max_similarity <= 1 else 1, auto=sample.batch_size == "auto",
        )  # fmt: skip
    if (score := source.score) is not None and (teacher := local_model(score, device, f"{key}.score")) is not None:
        models["teacher"] = TeacherSpec(teacher, score.tokens_at_once, auto=score.max_tokens_per_batch == "auto")
    if source.judge is not None:
        models["judge"] = judge_spec(source.judge, rows, device, f"{key}.judge")
    return models


def local_model(settings: LocalModelSettings, device: Device, key: str) -> LocalModel | None:
    """A local teacher or judge, from its configuration; None where a server or a Python function ranks.

    Args:
        settings: The settings of the teacher or judge.
        device: The device of the run, which the model shares.
        key: Key of the settings in the recipe, for errors.

    Raises:
        UserError: The model does not exist, cannot be reached or is not supported; the message has the key.
    """
    if settings.model is None:
        return None
    name, revision = settings.model, settings.revision
    method: str = settings.quantization
    double, adapters = True, 0
    try:
        if (stack := local_stack(name)) is not None:
            manifest = read_manifest(stack)
            name, revision = manifest.base["model"], manifest.base["revision"]
            method = quantization_method(manifest.quantization)
            double = (manifest.quantization or {}).get("bnb_4bit_use_double_quant", True)
            adapters = sum(_parameters(stack / entry.path) for entry in manifest.adapters)
        shape, _ = read_shape(name, revision)
    except UserError as error:
        raise type(error)(error.what, where=f"{key}.model ({settings.model})", fix=error.fix) from error
    precision = Precision(method, double, device.compute_bytes(shape), flash=device.bf16 and device.cuda)
    return LocalModel(settings.model, shape, precision, adapters, downloads=not is_on_disk(name, revision))


def _parameters(folder: Path) -> int:
    """Parameters of a saved adapter, which is stored in fp32."""
    return (folder / "adapter_model.safetensors").stat().st_size // 4


def judge_spec(settings: JudgeSettings, rows: Workload, device: Device, key: str) -> JudgeSpec | None:
    """A local judge of prompts with responses; arguments and errors as for `local_model`."""
    model = local_model(settings, device, key)
    if model is None:
        return None
    asked = questions(rows, settings.both_orders, settings.instructions)
    # An answer that cannot be parsed is asked for again, and sampled then.
    greedy = settings.temperature == 0 and settings.attempts == 1
    auto = settings.batch_size == "auto"
    return JudgeSpec(model, asked, settings.max_tokens, settings.questions_at_once, greedy, auto)


def _named_evaluation(recipe: Recipe, workloads: dict[str, Workload], device: Device) -> dict[str, TaskSpec]:
    """The tasks whose lengths are known; Super-NI is one task for each number of shots."""
    settings = recipe.named_evaluation
    if settings is None:
        return {}
    given, tasks = settings.tasks.given(), {}
    for key, workload in workloads.items():
        section, _, name = key.partition(".")
        if section != "evaluation":
            continue
        task: Any = given[name if name in given else "superni"]
        new = getattr(task, "max_new_tokens", None)
        judge = None
        if isinstance(task, VicunaTask):
            pairs = Workload(
                tuple(Row(row.prompt, (task.max_new_tokens,) * 2) for row in workload.rows), workload.total, ""
            )
            asked = task.judge.model_copy(update={"both_orders": True})
            judge = judge_spec(asked, pairs, device, "evaluation.tasks.vicuna.judge")
        size = UNPLANNED_BATCH if settings.batch_size == "auto" else settings.batch_size
        tasks[name] = TaskSpec(workload, new, judge, size, auto=settings.batch_size == "auto")
    return tasks


def _longest(workload: Workload, count: int) -> tuple[int, ...]:
    """Lengths of `count` texts: the longest, as it is not known which ones will be used."""
    count = min(count, workload.total)
    lengths = sorted((row.longest for row in workload.rows), reverse=True)[:count]
    return tuple(lengths + lengths[-1:] * (count - len(lengths)))


def _unplanned(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        sample = stage.feedback.sample if stage.feedback else None
        if sample is not None and sample.backend == "vllm":
            yield f"sampling of {stage.name}: vLLM loads a second copy of the model and uses all free memory"
        if sample is not None and sample.server is not None:
            yield f"sampling of {stage.name}: the server's memory, and the model exported for it on disk"
    if recipe.named_evaluation and recipe.named_evaluation.tasks.lm_eval:
        yield "evaluation of lm_eval: only the harness knows the number of prompts"


def require_native_bf16(recipe: Recipe, device: str, *, has_bf16: bool) -> None:
    """Rejects a recipe that requires bf16 on a GPU that only emulates it.

    Raises:
        UserError: A key requires bf16; the message names the first one.
    """
    if has_bf16:
        return
    asked: dict[str, Any] = {
        "base.dtype": recipe.base.dtype,
        "quantization.compute_dtype": recipe.quantization.compute_dtype,
        **{f"stages.{stage.name}.train.bf16": stage.train.get("bf16") for stage in recipe.stages},
    }
    for key, value in asked.items():
        if value in ("bfloat16", True):
            raise UserError(
                f"the {device} has no bf16, and `{key}` asks for it",
                where=key,
                fix="Leave the key out: the dtype is chosen for the GPU (fp16 here, with fp32 adapters).",
            )
