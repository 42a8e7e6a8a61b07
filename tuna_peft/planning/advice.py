"""What to change when a run does not fit: the cheapest change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from tuna_peft.planning.gpus import GPUS
from tuna_peft.planning.memory import optimizer_bytes
from tuna_peft.planning.plan import Device, Plan, RunSpec, StageSpec, make_plan
from tuna_peft.planning.workload import Row, Workload


@dataclass(frozen=True)
class Change:
    """One step towards fitting; each stands on those before it.

    Attributes:
        overrides: For the command line of `run`.
        cost: What it costs.
        peak: Bytes that are needed with it.
        fits: Whether that is little enough.
    """

    overrides: tuple[str, ...]
    cost: str
    peak: float
    fits: bool


def advise(plan: Plan) -> list[Change]:
    """The changes, in order, until the run fits or nothing is left to change; empty when it fits."""
    run, changes = plan.run, []
    peak = plan.needed
    if plan.fits:
        return []
    for overrides, cost, changed in _candidates(run):
        new = make_plan(changed(run), plan.device)
        if new.needed >= 0.995 * peak:
            continue  # touches something that does not decide
        run, peak = new.run, new.needed
        changes.append(Change(overrides, cost, peak, new.fits))
        if new.fits:
            break
    return changes


def smallest_gpu(run: RunSpec) -> str | None:
    """The card with the least memory in the table on which the run fits as it is."""
    fitting = [gpu for gpu in GPUS if make_plan(run, Device.of(gpu)).fits]
    return min(fitting, key=lambda gpu: gpu.memory_gib).name if fitting else None


_Candidate = tuple[tuple[str, ...], str, Callable[[RunSpec], RunSpec]]


def _candidates(run: RunSpec) -> Iterator[_Candidate]:
    if run.evaluation is not None:
        yield (
            ("evaluation.batch_size=1",),
            "slower evaluation, the same figures",
            lambda run: replace(run, evaluation=replace(run.evaluation, batch_size=1) if run.evaluation else None),
        )
    ranking = [stage for stage in run.stages if stage.kind == "ranking"]
    if ranking:
        budget = {stage.name: stage.smallest_pass.positions for stage in ranking}
        yield (
            tuple(f"stages.{name}.train.max_tokens_per_batch={tokens}" for name, tokens in budget.items()),
            "smaller forward passes, the same loss",
            lambda run: _stages(run, lambda stage: replace(stage, max_tokens=budget.get(stage.name))),
        )
    sft = [stage for stage in run.stages if stage.kind == "sft" and stage.batch_size > 1]
    if sft:
        yield (
            tuple(
                f"stages.{stage.name}.train.{key}"
                for stage in sft
                for key in (
                    "per_device_train_batch_size=1",
                    f"gradient_accumulation_steps={stage.accumulation * stage.batch_size}",
                )
            ),
            "smaller forward passes, the same step",
            lambda run: _stages(
                run,
                lambda stage: (
                    replace(stage, batch_size=1, accumulation=stage.accumulation * stage.batch_size)
                    if stage.kind == "sft"
                    else stage
                ),
            ),
        )
    kept = [stage for stage in run.stages if stage.activation_memory not in ("auto", "none")]
    if kept:
        key = {"sft": "gradient_checkpointing=true", "ranking": "activation_memory=none"}
        yield (
            tuple(f"stages.{stage.name}.train.{key[stage.kind]}" for stage in kept),
            "activations are computed twice: up to a third more time",
            lambda run: _stages(run, lambda stage: replace(stage, activation_memory="none")),
        )
    full = [stage for stage in run.stages if optimizer_bytes(stage.optimizer) > 2]
    if full:
        yield (
            tuple(f"stages.{stage.name}.train.optim=paged_adamw_8bit" for stage in full),
            "optimiser states in 8 bits",
            lambda run: _stages(run, lambda stage: replace(stage, optimizer="paged_adamw_8bit")),
        )
    if run.precision.method not in ("nf4", "fp4") or not run.precision.double_quant:
        yield (
            ("quantization={method: nf4, double_quant: true}",),
            "a base in 4 bits: a coarser start, and training in fewer gigabytes",
            lambda run: replace(run, precision=replace(run.precision, method="nf4", double_quant=True)),
        )
    for rank in (8, 4):
        if any(stage.adapter.rank > rank for stage in run.stages):
            yield (
                (f"lora.r={rank}",),
                "smaller adapters",
                partial(_stages, change=partial(_lower_rank, rank=rank)),
            )
    longest = max(row.longest for stage in run.stages for row in stage.workload.rows)
    for length in (512, 256):
        if longest > length:
            yield (
                tuple(
                    f"stages.{stage.name}.{key}"
                    for stage in run.stages
                    for key in (f"train.max_length={length}", "overflow=skip")
                ),
                "responses that are longer are left out",
                partial(_stages, change=partial(_shorter, length=length)),
            )


def _stages(run: RunSpec, change: Callable[[StageSpec], StageSpec]) -> RunSpec:
    return replace(run, stages=tuple(change(stage) for stage in run.stages))


def _lower_rank(stage: StageSpec, rank: int) -> StageSpec:
    old = stage.adapter
    if old.rank <= rank:
        return stage
    return replace(stage, adapter=replace(old, rank=rank, parameters=old.parameters * rank // old.rank))


def _shorter(stage: StageSpec, length: int) -> StageSpec:
    rows = tuple(
        Row(row.prompt, kept)
        for row in stage.workload.rows
        if (kept := tuple(response for response in row.responses if row.prompt + response <= length))
    )
    if not rows:
        return stage
    changed = replace(stage, workload=Workload(rows, stage.workload.total, stage.workload.source))
    if stage.max_tokens is None or stage.kind == "sft":
        return changed
    return replace(changed, max_tokens=min(stage.max_tokens, changed.smallest_pass.positions))
