"""What to change when a run does not fit: the cheapest change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from tuna_peft.planning.gpus import GPUS
from tuna_peft.planning.memory import optimizer_bytes
from tuna_peft.planning.plan import Plan, make_plan
from tuna_peft.planning.spec import Device, JudgeSpec, RunSpec, StageSpec, TaskSpec
from tuna_peft.planning.workload import Row, Workload


@dataclass(frozen=True)
class Change:
    """One change that saves memory, made on top of the changes before it.

    Attributes:
        overrides: Arguments `key=value` for `tuna-peft run`.
        cost: What is lost by it, in words.
        peak: Minimum memory of the run with it, in bytes.
        fits: Whether the device has that much memory.
    """

    overrides: tuple[str, ...]
    cost: str
    peak: float
    fits: bool


def advise(plan: Plan) -> list[Change]:
    """The changes, in order, until the run fits or nothing is left to change; empty when it fits."""
    changes: list[Change] = []
    while not plan.fits and (found := _cheapest(plan)) is not None:
        change, plan = found
        changes.append(change)
    return changes


def smallest_gpu(run: RunSpec) -> str | None:
    """The known GPU with the least memory on which the unchanged run fits; None if there is none."""
    fitting = [gpu for gpu in GPUS if make_plan(run, Device.of(gpu)).fits]
    return min(fitting, key=lambda gpu: gpu.memory_gib).name if fitting else None


def _cheapest(plan: Plan) -> tuple[Change, Plan] | None:
    """The cheapest change that lowers the run's minimum memory, and the plan with it."""
    for cost, (overrides, run) in _candidates(plan.run, plan.device):
        if not overrides:
            continue
        new = make_plan(run, plan.device)
        # A change that saves less than half a percent is not worth its cost.
        if new.needed < 0.995 * plan.needed:
            return Change(overrides, cost, new.needed, new.fits), new
    return None


# Overrides, and the run with them; no overrides where there is nothing to change.
_Changed = tuple[tuple[str, ...], RunSpec]
# Settings in a stage's section of the recipe, and the stage with them; None where the change does not apply.
_ChangedStage = tuple[tuple[str, ...], StageSpec] | None


def _candidates(run: RunSpec, device: Device) -> Iterator[tuple[str, _Changed]]:
    """Every change that may save memory, with its cost, the cheapest first."""
    yield from _smaller_batches(run, device)
    if run.compared:
        cost = "exports are written, but not compared with the unmerged adapters"
        yield cost, (("export.divergence_prompts=0",), replace(run, compared=()))
    yield "smaller forward passes, the same loss", _in_stages(run, partial(_smallest_passes, run=run))
    yield "smaller forward passes, the same optimizer step", _in_stages(run, _batch_of_one)
    yield "gradient checkpointing: up to a third more time", _in_stages(run, _gradient_checkpointing)
    yield "optimizer states in 8 bits", _in_stages(run, _optimizer_in_8_bits)
    yield "a teacher in 4 bits: slightly different scores", _in_stages(run, _teacher_in_4_bits)
    in_4_bits = _in_judges(run, "quantization=nf4", lambda judge: replace(judge, model=judge.model.in_4_bits()))
    yield "a judge in 4 bits", in_4_bits
    if run.precision.method not in ("nf4", "fp4") or not run.precision.double_quant:
        precision = replace(run.precision, method="nf4", double_quant=True)
        setting = "quantization={method: nf4, double_quant: true}"
        yield "a 4-bit base, which is less precise", ((setting,), replace(run, precision=precision))
    for rank in (8, 4):
        if any(stage.adapter.rank > rank for stage in run.stages):
            stages = tuple(_lower_rank(stage, rank) for stage in run.stages)
            yield "smaller adapters", ((f"lora.r={rank}",), replace(run, stages=stages))
    longest = max(row.longest for stage in run.stages for row in stage.workload.rows)
    for length in (512, 256):
        if longest > length:
            yield "responses that are longer are skipped", _in_stages(run, partial(_shorter, length=length))


def _smaller_batches(run: RunSpec, device: Device) -> Iterator[tuple[str, _Changed]]:
    """Smaller batches in generation and scoring; each as large as its phases allow."""
    if sizes := [task.batch_size for task in run.evaluation.values() if not task.auto]:
        yield "slower evaluation, the same results", _largest(
            device, "evaluate", max(sizes),
            lambda size: ((f"evaluation.batch_size={size}",),
                          _in_tasks(run, lambda task: task if task.auto else replace(task, batch_size=size))),
        )  # fmt: skip
    if samples := [stage.sample for stage in run.stages if stage.sample]:
        yield "slower sampling, the same distribution", _largest(
            device, "sample", max(sample.batch_size for sample in samples),
            lambda size: _in_stages(run, partial(_sample_batch, size=size)),
        )  # fmt: skip
    if teachers := [stage.teacher for stage in run.stages if stage.teacher]:
        workloads = [stage.prompt_workload for stage in run.stages if stage.teacher and stage.prompt_workload]
        yield "slower scoring, the same scores", _largest(
            device, "score", max(teacher.max_tokens for teacher in teachers),
            lambda size: _in_stages(run, partial(_score_batch, size=size)),
            least=max(row.tokens for workload in workloads for row in workload.rows),  # a row is never split
        )  # fmt: skip
    if judges := _judges(run):
        yield "slower judging, the same answers", _largest(
            device, "judge", max(judge.batch_size for judge in judges.values()),
            lambda size: _in_judges(run, f"batch_size={size}", lambda judge: replace(judge, batch_size=size)),
        )  # fmt: skip


def _largest(device: Device, phases: str, size: int, changed: Callable[[int], _Changed], least: int = 1) -> _Changed:
    """Halves a batch size until the phases whose names begin with `phases` fit, or it is `least`."""
    while size > least:
        size = max(size // 2, least)
        plan = make_plan(changed(size)[1], device)
        if all(phase.needed <= device.memory for phase in plan.phases if phase.name.startswith(phases)):
            break
    return changed(size)


def _sample_batch(stage: StageSpec, size: int) -> _ChangedStage:
    if stage.sample is None:
        return None
    return (f"data.sample.batch_size={size}",), replace(stage, sample=replace(stage.sample, batch_size=size))


def _score_batch(stage: StageSpec, size: int) -> _ChangedStage:
    if stage.teacher is None:
        return None
    changed = replace(stage, teacher=replace(stage.teacher, max_tokens=size))
    return (f"data.score.max_tokens_per_batch={size}",), changed


def _smallest_passes(stage: StageSpec, run: RunSpec) -> _ChangedStage:
    if stage.kind != "ranking":
        return None
    # The rounds of a stage share a section of the recipe: the budget has to do for the longest row of all.
    tokens = max(other.smallest_pass.positions for other in run.stages if other.key == stage.key)
    return (f"train.max_tokens_per_batch={tokens}",), replace(stage, max_tokens=tokens)


def _batch_of_one(stage: StageSpec) -> _ChangedStage:
    if stage.kind != "sft" or stage.batch_size == 1:
        return None
    steps = stage.accumulation * stage.batch_size
    settings = "train.per_device_train_batch_size=1", f"train.gradient_accumulation_steps={steps}"
    return settings, replace(stage, batch_size=1, accumulation=steps)


def _gradient_checkpointing(stage: StageSpec) -> _ChangedStage:
    if stage.activation_memory in ("auto", "none"):
        return None
    setting = {"sft": "gradient_checkpointing=true", "ranking": "activation_memory=none"}[stage.kind]
    return (f"train.{setting}",), replace(stage, activation_memory="none")


def _optimizer_in_8_bits(stage: StageSpec) -> _ChangedStage:
    name = "paged_adamw_8bit"
    if optimizer_bytes(stage.optimizer) <= optimizer_bytes(name):
        return None
    return (f"train.optim={name}",), replace(stage, optimizer=name)


def _teacher_in_4_bits(stage: StageSpec) -> _ChangedStage:
    teacher = stage.teacher
    if teacher is None or not teacher.model.is_unquantized:
        return None
    changed = replace(stage, teacher=replace(teacher, model=teacher.model.in_4_bits()))
    return ("data.score.quantization=nf4",), changed


def _lower_rank(stage: StageSpec, rank: int) -> StageSpec:
    old = stage.adapter
    if old.rank <= rank:
        return stage
    return replace(stage, adapter=replace(old, rank=rank, parameters=old.parameters * rank // old.rank))


def _shorter(stage: StageSpec, length: int) -> _ChangedStage:
    settings = f"train.max_length={length}", "overflow=skip"
    rows = tuple(
        Row(row.prompt, kept)
        for row in stage.workload.rows
        if (kept := tuple(response for response in row.responses if row.prompt + response <= length))
    )
    if not rows:
        return settings, stage
    changed = replace(stage, workload=Workload(rows, stage.workload.total, stage.workload.source))
    if stage.max_tokens is None or stage.kind == "sft":
        return settings, changed
    return settings, replace(changed, max_tokens=min(stage.max_tokens, changed.smallest_pass.positions))


def _in_stages(run: RunSpec, change: Callable[[StageSpec], _ChangedStage]) -> _Changed:
    """A change in every stage that it applies to."""
    overrides: list[str] = []
    stages: list[StageSpec] = []
    for stage in run.stages:
        settings, changed = change(stage) or ((), stage)
        overrides += [f"{stage.key}.{setting}" for setting in settings]
        stages.append(changed)
    # The rounds of a stage share a section of the recipe, and so their overrides.
    return tuple(dict.fromkeys(overrides)), replace(run, stages=tuple(stages))


def _judges(run: RunSpec) -> dict[str, JudgeSpec]:
    """The local judges, by their key in the recipe."""
    found = {f"{stage.key}.data.judge": stage.judge for stage in run.stages}
    found |= {f"evaluation.tasks.{name}.judge": task.judge for name, task in run.evaluation.items()}
    return {key: judge for key, judge in found.items() if judge}


def _in_judges(run: RunSpec, setting: str, change: Callable[[JudgeSpec], JudgeSpec]) -> _Changed:
    """A change of every local judge that it applies to."""
    overrides = tuple(f"{key}.{setting}" for key, judge in _judges(run).items() if change(judge) != judge)
    stages = tuple(replace(stage, judge=stage.judge and change(stage.judge)) for stage in run.stages)
    changed = _in_tasks(run, lambda task: replace(task, judge=task.judge and change(task.judge)))
    return overrides, replace(changed, stages=stages)


def _in_tasks(run: RunSpec, change: Callable[[TaskSpec], TaskSpec]) -> RunSpec:
    return replace(run, evaluation={name: change(task) for name, task in run.evaluation.items()})
