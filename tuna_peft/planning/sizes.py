"""Sizes of batches that follow a device's memory: what `auto` means in a recipe, by the formulas of the plan.

`plan.make_plan` replaces every `auto` by what `sized` finds; a run writes them into its folder and keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tuna_peft.limits import ACTIVATIONS_IN_RAM, DENSE_COPY, activations_on_gpu
from tuna_peft.planning.memory import (
    Precision,
    activation_bytes,
    dense_bytes,
    generation_bytes,
    layer_bytes,
    scoring_bytes,
)
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.spec import Device, JudgeSpec, LocalModel, RunSpec, StageSpec
from tuna_peft.planning.workload import Workload, packed_pass

# Larger sizes gain nothing: a GPU is busy long before, and a CPU multiplies a few rows as fast as many.
MOST_TOKENS = {True: 32_768, False: 4096}
MOST_SEQUENCES = {True: 256, False: 32}
_TOKEN_STEP = 512
# The models that make a stage's training data: attribute of the stage, attribute with its size, key of that size.
_SIZES = (
    ("sample", "batch_size", "data.sample.batch_size"),
    ("teacher", "max_tokens", "data.score.max_tokens_per_batch"),
    ("judge", "batch_size", "data.judge.batch_size"),
)


def sized(run: RunSpec, device: Device) -> RunSpec:
    """`run` with a number for each size that is `auto`."""
    stages = []
    for index, stage in enumerate(run.stages):
        if stage.auto_tokens:
            stage = replace(stage, max_tokens=_tokens(run, index, device))
        if (prompts := stage.prompt_workload) is not None:
            own = sum(run.weights(index).values())
            sample, teacher, judge = stage.sample, stage.teacher, stage.judge
            if sample is not None and sample.auto:
                size = sequences(run.shape, run.precision, own, device, prompts, sample.new_tokens, sample.n)
                sample = replace(sample, batch_size=size)
            if teacher is not None and teacher.auto:
                teacher = replace(teacher, max_tokens=scored_tokens(teacher.model, own, device, prompts))
            if judge is not None:
                judge = sized_judge(judge, own, device)
            stage = replace(stage, sample=sample, teacher=teacher, judge=judge)
        stages.append(stage)
    run = replace(run, stages=tuple(_shared(stages)))
    own, evaluation = sum(run.weights(len(run.stages)).values()), {}
    for name, task in run.evaluation.items():
        if task.auto:
            size = sequences(run.shape, run.precision, own, device, task.workload, task.new_tokens)
            task = replace(task, batch_size=size)
        evaluation[name] = replace(task, judge=task.judge and sized_judge(task.judge, own, device))
    return replace(run, evaluation=evaluation)


def sizes_of(run: RunSpec) -> dict[str, int]:
    """The sizes of a run that are `auto` in its recipe, by their keys there.

    Not those of evaluation: each task has its own, which is found when its prompts are known (`command_sizes`).
    """
    found: dict[str, int] = {}
    for stage in run.stages:
        if stage.auto_tokens and stage.max_tokens is not None:
            found[f"{stage.key}.train.max_tokens_per_batch"] = stage.max_tokens
        for name, size, key in _SIZES:
            if (model := getattr(stage, name)) is not None and model.auto:
                found[f"{stage.key}.{key}"] = getattr(model, size)
    for name, task in run.evaluation.items():
        if task.judge is not None and task.judge.auto:
            found[f"evaluation.tasks.{name}.judge.batch_size"] = task.judge.batch_size
    return found


def _shared(stages: list[StageSpec]) -> list[StageSpec]:
    """The rounds of a stage share a section of the recipe, and so its sizes: the largest row and the least memory."""
    for number, stage in enumerate(stages):
        rounds = [other for other in stages if other.key == stage.key]
        if stage.auto_tokens:
            least = min(other.max_tokens or 0 for other in rounds)
            longest = max(other.smallest_pass.positions for other in rounds)
            stage = replace(stage, max_tokens=max(least, longest))
        for name, size, _ in _SIZES:
            if (model := getattr(stage, name)) is not None and model.auto:
                least = min(getattr(other, size) for one in rounds if (other := getattr(one, name)))
                stage = replace(stage, **{name: replace(model, **{size: least})})
        stages[number] = stage
    return stages


def _tokens(run: RunSpec, index: int, device: Device) -> int:
    """Tokens of a training pass: as many as fit with all layers keeping their activations, at least the longest row.

    Recomputing costs a third more; a second prompt in a pass saves less than that.
    """
    stage, below, shape = run.stages[index], run.below(index), run.shape
    free = device.free(sum(run.trained_weights(index).values()))
    budget = activations_on_gpu(stage.processes) * free if device.cuda else ACTIVATIONS_IN_RAM * free / stage.processes
    keeps = stage.activation_memory in ("auto", "full")

    def fits(tokens: int) -> bool:  # as `training/activation_memory.py` decides
        batch = packed_pass(stage.workload.rows, stage.batch_size, tokens)
        kept = shape.layers * layer_bytes(shape, batch, run.precision, stage.adapter, below) if keeps else 0
        return activation_bytes(shape, batch, run.precision, stage.adapter, below) + kept <= budget

    return max(_largest(fits, _TOKEN_STEP, MOST_TOKENS[device.cuda]), stage.smallest_pass.positions)


def sequences(
    shape: ModelShape,
    precision: Precision,
    fixed: float,
    device: Device,
    workload: Workload,
    new_tokens: int | None,
    n: int = 1,
) -> int:
    """Responses generated at once, or prompts scored at once if `new_tokens` is None.

    Args:
        fixed: Bytes of all weights in memory.
    """
    free, dense = device.free(fixed), dense_bytes(shape, precision)
    # `has_room_for_dense` measures what is free, which is not exactly what is planned here: a tenth of margin.
    held = dense if dense <= 1.1 * DENSE_COPY * free else 0.0
    room = activations_on_gpu(2) * free - held
    longest = max(row.prompt for row in workload.rows)

    def fits(size: int) -> bool:
        if new_tokens is None:
            return scoring_bytes(shape, packed_pass(workload.rows, size, None), precision) <= room
        parts = generation_bytes(
            shape, precision, prompts=max(size // n, 1), n=n, prompt=longest, new=new_tokens, greedy=False, top_p=True
        )
        return sum(parts.values()) <= room

    most = MOST_SEQUENCES[device.cuda]
    return next((size for size in (256, 128, 64, 32, 16, 8, 4, 2) if size <= most and fits(size)), 1)


def scored_tokens(teacher: LocalModel, fixed: float, device: Device, workload: Workload) -> int:
    """Tokens of a forward pass in which a local teacher scores responses.

    Args:
        fixed: Bytes of the other weights in memory.
    """
    room = activations_on_gpu(2) * device.free(fixed + sum(teacher.parts.values()))

    def fits(tokens: int) -> bool:
        batch = packed_pass(workload.rows, workload.total, tokens)
        return scoring_bytes(teacher.shape, batch, teacher.precision) <= room

    longest = packed_pass(workload.rows, 1, None).positions
    return max(_largest(fits, _TOKEN_STEP, MOST_TOKENS[device.cuda]), longest)


def sized_judge(judge: JudgeSpec, fixed: float, device: Device) -> JudgeSpec:
    """`judge` with a number of questions, if that is `auto`; `fixed` are the bytes of the other weights in memory."""
    if not judge.auto:
        return judge
    model = judge.model
    fixed += sum(model.parts.values())
    return replace(
        judge,
        batch_size=sequences(model.shape, model.precision, fixed, device, judge.questions, judge.new_tokens),
    )


def _largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step
