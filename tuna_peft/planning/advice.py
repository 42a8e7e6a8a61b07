"""What to change when a run does not fit: the cheapest change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tuna_peft.planning.gpus import GPUS
from tuna_peft.planning.memory import optimizer_bytes
from tuna_peft.planning.plan import Plan, make_plan
from tuna_peft.planning.spec import Device, JudgeSpec, RunSpec, StageSpec, TeacherSpec
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
    changes: list[Change] = []
    while not plan.fits and (found := _cheapest(plan)) is not None:
        change, plan = found
        changes.append(change)
    return changes


def _cheapest(plan: Plan) -> tuple[Change, Plan] | None:
    """The cheapest change that touches what decides, and the plan with it."""
    for overrides, cost, change in _candidates(plan.run, plan.device):
        new = make_plan(change(plan.run), plan.device)
        if new.needed < 0.995 * plan.needed:
            return Change(overrides, cost, new.needed, new.fits), new
    return None


def smallest_gpu(run: RunSpec) -> str | None:
    """The card with the least memory in the table on which the run fits as it is."""
    fitting = [gpu for gpu in GPUS if make_plan(run, Device.of(gpu)).fits]
    return min(fitting, key=lambda gpu: gpu.memory_gib).name if fitting else None


_Candidate = tuple[tuple[str, ...], str, Callable[[RunSpec], RunSpec]]


def _candidates(run: RunSpec, device: Device) -> Iterator[_Candidate]:
    yield from _smaller_batches(run, device)
    if run.compared:
        yield (
            ("export.divergence_prompts=0",),
            "exports are written, and not compared with the stack",
            lambda run: replace(run, compared=()),
        )
    ranking = [stage for stage in run.stages if stage.kind == "ranking"]
    if ranking:
        budget: dict[str, int] = {}
        for stage in ranking:  # rounds share a section
            budget[stage.key] = max(stage.smallest_pass.positions, budget.get(stage.key, 0))
        yield (
            tuple(f"{key}.train.max_tokens_per_batch={tokens}" for key, tokens in budget.items()),
            "smaller forward passes, the same loss",
            lambda run: _stages(run, lambda stage: replace(stage, max_tokens=budget.get(stage.key))),
        )
    sft = [stage for stage in run.stages if stage.kind == "sft" and stage.batch_size > 1]
    if sft:
        yield (
            tuple(
                f"{stage.key}.train.{key}"
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
            _each(kept, lambda stage: f"train.{key[stage.kind]}"),
            "activations are computed twice: up to a third more time",
            lambda run: _stages(run, lambda stage: replace(stage, activation_memory="none")),
        )
    full = [stage for stage in run.stages if optimizer_bytes(stage.optimizer) > 2]
    if full:
        yield (
            _each(full, lambda stage: "train.optim=paged_adamw_8bit"),
            "optimiser states in 8 bits",
            lambda run: _stages(run, lambda stage: replace(stage, optimizer="paged_adamw_8bit")),
        )
    yield from _helpers_in_4_bits(run)
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
            settings = (f"train.max_length={length}", "overflow=skip")
            yield (
                tuple(dict.fromkeys(f"{stage.key}.{setting}" for stage in run.stages for setting in settings)),
                "responses that are longer are left out",
                partial(_stages, change=partial(_shorter, length=length)),
            )


def _smaller_batches(run: RunSpec, device: Device) -> Iterator[_Candidate]:
    """Of what is written and scored: as large as they can be."""
    if run.evaluation is not None:
        size, change = _largest(run, device, "evaluate", run.evaluation.batch_size, _evaluate_at_once)
        yield (f"evaluation.batch_size={size}",), "slower evaluation, the same figures", change
    drawing = [stage for stage in run.stages if stage.sample]
    if drawing:
        most = max(stage.sample.batch_size for stage in drawing if stage.sample)
        size, change = _largest(run, device, "sample", most, _sample_at_once)
        yield _each(drawing, lambda stage: f"data.sample.batch_size={size}"), "slower sampling, the same odds", change
    scored = [stage for stage in run.stages if stage.teacher]
    if scored:
        most = max(stage.teacher.max_tokens for stage in scored if stage.teacher)
        longest = max(row.tokens for stage in scored if stage.prompt_workload for row in stage.prompt_workload.rows)
        size, change = _largest(run, device, "score", most, _score_at_once, least=longest)
        settings = _each(scored, lambda stage: f"data.score.max_tokens_per_batch={size}")
        yield settings, "slower scoring, the same scores", change
    judges = [judge for _, judge in _judges(run)]
    if judges:
        size, change = _largest(run, device, "judge", max(judge.batch_size for judge in judges), _judge_at_once)
        yield tuple(f"{key}.batch_size={size}" for key, _ in _judges(run)), "slower judging, the same answers", change


def _largest(
    run: RunSpec, device: Device, phases: str, size: int, change: Callable[[RunSpec, int], RunSpec], least: int = 1
) -> tuple[int, Callable[[RunSpec], RunSpec]]:
    """The size, halved until the phases fit or nothing less is left, and the change to it."""
    while size > least:
        size = max(size // 2, least)
        plan = make_plan(change(run, size), device)
        if all(phase.needed <= device.memory for phase in plan.phases if phase.name.startswith(phases)):
            break
    return size, lambda run: change(run, size)


def _evaluate_at_once(run: RunSpec, size: int) -> RunSpec:
    return replace(run, evaluation=replace(run.evaluation, batch_size=size)) if run.evaluation else run


def _sample_at_once(run: RunSpec, size: int) -> RunSpec:
    return _stages(
        run,
        lambda stage: replace(stage, sample=replace(stage.sample, batch_size=size)) if stage.sample else stage,
    )


def _score_at_once(run: RunSpec, size: int) -> RunSpec:
    return _with_teachers(run, lambda teacher: replace(teacher, max_tokens=size))


def _judge_at_once(run: RunSpec, size: int) -> RunSpec:
    return _with_judges(run, lambda judge: replace(judge, batch_size=size))


def _helpers_in_4_bits(run: RunSpec) -> Iterator[_Candidate]:
    """Teachers and judges."""
    teachers = [stage for stage in run.stages if stage.teacher and stage.teacher.model.is_unquantized]
    if teachers:
        yield (
            _each(teachers, lambda stage: "data.score.quantization=nf4"),
            "a teacher in 4 bits: scores that are a little off",
            lambda run: _with_teachers(run, lambda teacher: replace(teacher, model=teacher.model.in_4_bits())),
        )
    judges = [key for key, judge in _judges(run) if judge.model.is_unquantized]
    if judges:
        yield (
            tuple(f"{key}.quantization=nf4" for key in judges),
            "a judge in 4 bits",
            lambda run: _with_judges(run, lambda judge: replace(judge, model=judge.model.in_4_bits())),
        )


def _each(stages: Sequence[StageSpec], setting: Callable[[StageSpec], str]) -> tuple[str, ...]:
    """An override for each section of the recipe."""
    return tuple(dict.fromkeys(f"{stage.key}.{setting(stage)}" for stage in stages))


def _judges(run: RunSpec) -> list[tuple[str, JudgeSpec]]:
    """The judges that run here, by their place in the recipe."""
    found = {f"{stage.key}.data.judge": stage.judge for stage in run.stages}
    tasks = run.evaluation.tasks if run.evaluation else {}
    found |= {f"evaluation.tasks.{name}.judge": task.judge for name, task in tasks.items()}
    return [(key, judge) for key, judge in found.items() if judge]


def _with_teachers(run: RunSpec, change: Callable[[TeacherSpec], TeacherSpec]) -> RunSpec:
    return _stages(run, lambda stage: replace(stage, teacher=change(stage.teacher)) if stage.teacher else stage)


def _with_judges(run: RunSpec, change: Callable[[JudgeSpec], JudgeSpec]) -> RunSpec:
    run = _stages(run, lambda stage: replace(stage, judge=change(stage.judge)) if stage.judge else stage)
    if run.evaluation is None:
        return run
    tasks = {
        name: replace(task, judge=change(task.judge)) if task.judge else task
        for name, task in run.evaluation.tasks.items()
    }
    return replace(run, evaluation=replace(run.evaluation, tasks=tasks))


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
