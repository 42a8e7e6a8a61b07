"""Memory and time of a whole run, phase by phase in their order, on a card or in main memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tuna_peft.planning.flops import forward_flops, hours
from tuna_peft.planning.inference import logits_bytes
from tuna_peft.planning.memory import frozen_parts, weight_parts
from tuna_peft.planning.phases import Passes, Phase, training
from tuna_peft.planning.spec import Device, JudgeSpec, RunSpec
from tuna_peft.planning.storage import disk, main_memory


@dataclass
class Plan:
    """All phases of a run on one device.

    Attributes:
        ram, disk: Bytes of main memory and of disk by what they are for.
    """

    run: RunSpec
    device: Device
    phases: list[Phase]
    ram: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> Phase:
        """The phase that decides whether the run fits."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def needed(self) -> float:
        """Bytes of memory without which the run cannot be."""
        return self.largest.needed

    @property
    def peak(self) -> float:
        """Bytes of memory that the run will take."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.needed <= self.device.memory

    @property
    def hours(self) -> float | None:
        """Of all phases; None where the speed is unknown."""
        known = [phase.hours for phase in self.phases]
        return None if None in known else sum(hour for hour in known if hour is not None)


def make_plan(run: RunSpec, device: Device) -> Plan:
    """Predicts a run."""
    phases: list[Phase] = []
    for index in range(len(run.stages)):
        phases += [*_ranking_phases(run, index, device), training(run, index, device)]
    phases += [*_evaluation(run, device), *_comparison(run, device)]
    return Plan(run, device, phases, main_memory(run, device), disk(run, device))


def _held(run: RunSpec, stages: int) -> dict[str, float]:
    """The base with the adapters of so many stages."""
    return weight_parts(run.shape, run.precision) | frozen_parts(run.stack(stages), run.precision)


def _ranking_phases(run: RunSpec, index: int, device: Device) -> Iterator[Phase]:
    """What the run does to make the rows of a stage: the models that rank are loaded beside its own."""
    stage, held = run.stages[index], _held(run, index)
    prompts = stage.prompt_workload
    if prompts is None:
        return
    if (sample := stage.sample) is not None:
        note = f"1 to {sample.draws} draws" if sample.draws > 1 else ""
        passes = Passes(f"sample {stage.name}", held, run.shape, run.precision, device, note=note)
        yield passes.generation(
            prompts, sample.new_tokens, sample.prompts_at_once, sample.n, greedy=False, top_p=sample.top_p
        )
    if (teacher := stage.teacher) is not None:
        model = teacher.model
        passes = Passes(f"score {stage.name}", held | model.parts, model.shape, model.precision, device)
        yield passes.scoring(prompts, prompts.total, teacher.max_tokens)
    if stage.judge is not None:
        yield _judging(f"judge {stage.name}", held, stage.judge, device)


def _judging(name: str, held: dict[str, float], judge: JudgeSpec, device: Device, times: int = 1) -> Phase:
    model, note = judge.model, f"{times} times" if times > 1 else ""
    passes = Passes(name, held | model.parts, model.shape, model.precision, device, times, note)
    return passes.generation(judge.questions, judge.new_tokens, judge.batch_size, greedy=judge.greedy)


def _evaluation(run: RunSpec, device: Device) -> Iterator[Phase]:
    settings, times = run.evaluation, len(run.stages) + 1
    if settings is None:
        return
    held = _held(run, len(run.stages))
    for name, task in settings.tasks.items():
        passes = Passes(f"evaluate: {name}", held, run.shape, run.precision, device, times, f"{times} times")
        if task.new_tokens is None:
            yield passes.scoring(task.workload, settings.batch_size)
        else:
            yield passes.generation(task.workload, task.new_tokens, settings.batch_size)
        if task.judge is not None:
            yield _judging(f"judge {name}", held, task.judge, device, times)


def _comparison(run: RunSpec, device: Device) -> Iterator[Phase]:
    """The stack's logits at the end. A merged model takes what memory there is; see `storage` for the rest of it."""
    if run.compared:
        held, longest = _held(run, len(run.stages)), max(run.compared)
        moving = logits_bytes(run.shape, longest, run.precision)
        passes = Passes("compare exports", held, run.shape, run.precision, device)
        tokens = float(sum(run.compared))
        flops = forward_flops(run.shape, tokens, tokens)
        taken = hours(flops, device.gpu) if device.gpu else None
        # Nothing at least: other texts than the longest may be taken.
        yield passes.phase({f"all logits of {longest:,} tokens": moving}, 0.0, tokens, flops, taken)
