"""Sizes of batches that follow a device's memory: what `auto` means in a recipe, by the formulas of the plan.

`plan.make_plan` replaces every `auto` by what `sized` finds; a run writes them into its folder and keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tuna_peft.limits import ACTIVATIONS_IN_RAM, activations_on_gpu
from tuna_peft.planning.memory import (
    CUDA_CONTEXT,
    PROCESS,
    activation_bytes,
    dense_bytes,
    frozen_parts,
    generation_bytes,
    layer_bytes,
    scoring_bytes,
    trainer_parts,
    weight_parts,
)
from tuna_peft.planning.spec import Device, RunSpec, StageSpec
from tuna_peft.planning.workload import Workload, packed_pass

# Larger sizes gain nothing: a GPU is busy long before, and a CPU multiplies a few rows as fast as many.
MOST_TOKENS = {True: 32_768, False: 4096}
MOST_SEQUENCES = {True: 256, False: 32}
_TOKEN_STEP = 512


def sized(run: RunSpec, device: Device) -> RunSpec:
    """`run` with a number for each size that is `auto`."""
    stages = []
    for index, stage in enumerate(run.stages):
        if stage.auto_tokens:
            stage = replace(stage, max_tokens=_tokens(run, index, device))
        if stage.sample is not None and stage.sample.auto and stage.prompt_workload is not None:
            size = _sequences(run, index, device, stage.prompt_workload, stage.sample.new_tokens, stage.sample.n)
            stage = replace(stage, sample=replace(stage.sample, batch_size=size))
        stages.append(stage)
    run = replace(run, stages=tuple(_shared(stages)))
    if run.evaluation is not None and run.evaluation.auto:
        sizes = [MOST_SEQUENCES[device.cuda]]
        for task in run.evaluation.tasks.values():
            sizes.append(_sequences(run, len(run.stages), device, task.workload, task.new_tokens))
        run = replace(run, evaluation=replace(run.evaluation, batch_size=min(sizes)))
    return run


def sizes_of(run: RunSpec) -> dict[str, int]:
    """The sizes of a run that are `auto` in its recipe, by their keys there."""
    found: dict[str, int] = {}
    for stage in run.stages:
        if stage.auto_tokens and stage.max_tokens is not None:
            found[f"{stage.key}.train.max_tokens_per_batch"] = stage.max_tokens
        if stage.sample is not None and stage.sample.auto:
            found[f"{stage.key}.data.sample.batch_size"] = stage.sample.batch_size
    if run.evaluation is not None and run.evaluation.auto:
        found["evaluation.batch_size"] = run.evaluation.batch_size
    return found


def _shared(stages: list[StageSpec]) -> list[StageSpec]:
    """The rounds of a stage share a section of the recipe, and so its sizes: the largest row and the least memory."""
    for number, stage in enumerate(stages):
        rounds = [other for other in stages if other.key == stage.key]
        if stage.auto_tokens:
            least = min(other.max_tokens or 0 for other in rounds)
            longest = max(other.smallest_pass.positions for other in rounds)
            stage = replace(stage, max_tokens=max(least, longest))
        if stage.sample is not None and stage.sample.auto:
            size = min(other.sample.batch_size for other in rounds if other.sample)
            stage = replace(stage, sample=replace(stage.sample, batch_size=size))
        stages[number] = stage
    return stages


def _tokens(run: RunSpec, index: int, device: Device) -> int:
    """Tokens of a training pass: as many as fit with all layers keeping their activations, at least the longest row.

    Recomputing costs a third more; a second prompt in a pass saves less than that.
    """
    stage, below, shape = run.stages[index], run.below(index), run.shape
    fixed = weight_parts(shape, run.precision) | trainer_parts(stage.adapter, below, stage.optimizer, run.precision)
    free = _free(device, fixed)
    budget = activations_on_gpu(stage.processes) * free if device.cuda else ACTIVATIONS_IN_RAM * free / stage.processes
    keeps = stage.activation_memory in ("auto", "full")

    def fits(tokens: int) -> bool:  # as `training/activation_memory.py` decides
        batch = packed_pass(stage.workload.rows, stage.batch_size, tokens)
        kept = shape.layers * layer_bytes(shape, batch, run.precision, stage.adapter, below) if keeps else 0
        return activation_bytes(shape, batch, run.precision, stage.adapter, below) + kept <= budget

    return max(_largest(fits, _TOKEN_STEP, MOST_TOKENS[device.cuda]), stage.smallest_pass.positions)


def _sequences(
    run: RunSpec, stages: int, device: Device, workload: Workload, new_tokens: int | None, n: int = 1
) -> int:
    """Responses generated at once with the adapters of the first `stages` stages, or prompts scored at once."""
    shape, precision = run.shape, run.precision
    fixed = weight_parts(shape, precision) | frozen_parts(run.stack(stages), precision)
    # With the dense copy, whether it will be held or not: it may take half of what is free.
    free = _free(device, fixed)
    room = activations_on_gpu(2) * free - min(dense_bytes(shape, precision), free / 2)
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


def _free(device: Device, fixed: dict[str, float]) -> float:
    return device.memory - (CUDA_CONTEXT if device.cuda else PROCESS) - sum(fixed.values())


def _largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step
