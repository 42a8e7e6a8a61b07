"""Memory and time of a whole run, phase by phase in their order, on a card or in main memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tuna_peft.limits import ACTIVATIONS_IN_RAM, ACTIVATIONS_ON_GPU, GIB, activation_policy, response_room
from tuna_peft.planning.flops import decode_hours, forward_flops, hours, ranking_flops, sft_flops
from tuna_peft.planning.memory import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    PROCESS,
    Precision,
    activation_bytes,
    frozen_parts,
    generation_bytes,
    layer_bytes,
    logits_bytes,
    scoring_bytes,
    trainer_parts,
    weight_parts,
)
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.spec import Device, JudgeSpec, RunSpec
from tuna_peft.planning.storage import disk, main_memory
from tuna_peft.planning.workload import ForwardPass, Workload, packed_pass


@dataclass
class Phase:
    """One part of a run at its peak.

    Attributes:
        name: `train sft`, `evaluate: rank` ...
        parts: Bytes by part.
        margin: Context and fragmentation, which `max_memory_allocated` does not show.
        needed: Bytes of memory without activations that are kept only because there is room for them.
        smallest: Bytes that tensors hold at least, where it can go on with smaller passes.
        hours: None where nothing is known about the device's speed.
        note: What else to say.
    """

    name: str
    parts: dict[str, float]
    margin: float
    needed: float
    smallest: float
    tokens: float = 0.0
    flops: float = 0.0
    hours: float | None = None
    steps: int | None = None
    note: str = ""

    @property
    def allocated(self) -> float:
        """Bytes that tensors hold: what `torch.cuda.max_memory_allocated` would say."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """Bytes of memory that it takes."""
        return self.allocated + self.margin


def training(run: RunSpec, index: int, device: Device) -> Phase:
    """A stage that trains."""
    stage, below, shape = run.stages[index], run.below(index), run.shape
    held = weight_parts(shape, run.precision) | trainer_parts(stage.adapter, below, stage.optimizer, run.precision)
    batch = stage.largest_pass

    def activations(batch: ForwardPass, kept: int) -> float:
        return activation_bytes(
            shape, batch, run.precision, stage.adapter, below, kept, supervised=stage.kind == "sft"
        )

    kept = _kept_layers(run, index, device, sum(held.values()))
    moving = activations(batch, kept)
    # What is kept only because there is room is not needed.
    at_least = activations(batch, 0) if stage.activation_memory == "auto" else moving
    count = sft_flops if stage.kind == "sft" else ranking_flops
    flops = count(shape, stage.workload, stage.adapter, below, kept) * stage.rows_seen
    return Phase(
        f"train {stage.name}",
        {**held, f"activations of {batch.positions:,} tokens": moving},
        _margin(device, moving),
        needed=sum(held.values()) + at_least + _margin(device, at_least),
        smallest=sum(held.values()) + activations(stage.smallest_pass, 0 if stage.kind == "ranking" else kept),
        tokens=stage.workload.tokens * stage.rows_seen,
        flops=flops,
        hours=hours(flops / stage.processes, device.gpu) if device.gpu else None,
        steps=stage.steps,
        note=f"keeps {kept}/{shape.layers}",
    )


def _kept_layers(run: RunSpec, index: int, device: Device, held: float) -> int:
    """Layers that keep their activations in the largest pass, as `training/activation_memory.py` chooses them."""
    stage, below, layers = run.stages[index], run.below(index), run.shape.layers
    setting, batch = activation_policy(stage.activation_memory, stage.processes), stage.largest_pass
    if setting == "full":
        return layers
    if setting == "none":
        return 0
    if setting != "auto":
        budget = float(setting) * GIB
    elif device.cuda:
        recomputing = activation_bytes(run.shape, batch, run.precision, stage.adapter, below)
        budget = ACTIVATIONS_ON_GPU * (device.memory - CUDA_CONTEXT - held) - recomputing
    else:
        budget = ACTIVATIONS_IN_RAM * (device.memory - PROCESS - held)
    layer = layer_bytes(run.shape, batch, run.precision, stage.adapter, below)
    return max(min(int(budget / layer), layers), 0)


@dataclass(frozen=True)
class Passes:
    """Who reads or writes, and how often.

    Attributes:
        held: Bytes that stay, by part: the weights of all models that are loaded.
        shape, precision: Of the model that computes.
        times: How often the whole work is done.
    """

    name: str
    held: Mapping[str, float]
    shape: ModelShape
    precision: Precision
    device: Device
    times: int = 1
    note: str = ""

    def scoring(self, workload: Workload, batch_size: int, max_tokens: int | None = None) -> Phase:
        """Log-probabilities of responses, in passes of so many rows, or of so many tokens."""
        batch = packed_pass(workload.rows, batch_size, max_tokens)
        moving = scoring_bytes(self.shape, batch, self.precision)
        one = scoring_bytes(self.shape, packed_pass(workload.rows, 1, None), self.precision)
        count = workload.total * self.times
        tokens = workload.tokens * count
        flops = forward_flops(self.shape, tokens, workload.response_tokens * count)
        gpu = self.device.gpu
        parts = {f"a forward pass of {batch.positions:,} tokens": moving}
        return self.phase(parts, one, tokens, flops, hours(flops, gpu) if gpu else None)

    def generation(
        self, workload: Workload, new: int, prompts: int, n: int = 1, *, greedy: bool = True, top_p: bool = False
    ) -> Phase:
        """`n` responses of `new` tokens to every prompt, `prompts` prompts at a time; they may all end earlier."""
        longest = max(row.prompt for row in workload.rows)
        if context := self.shape.context:  # ends what is written
            longest = min(longest, context - 1)
        room = response_room(new, longest, context)

        def moving(prompts: int, n: int) -> dict[str, float]:
            return generation_bytes(
                self.shape, self.precision, prompts=prompts, n=n, prompt=longest, new=room, greedy=greedy, top_p=top_p
            )

        at_once = min(prompts, workload.total)
        count = workload.total * self.times
        steps = math.ceil(workload.total / prompts) * self.times * new
        read = count * workload.prompt_tokens
        written = float(count * n * new)
        flops = forward_flops(self.shape, read + written, count + written)
        taken = None
        if gpu := self.device.gpu:
            seen = at_once * n * (workload.prompt_tokens + new / 2)
            taken = decode_hours(self.shape, self.precision, steps, seen, gpu)
            taken += hours(forward_flops(self.shape, read, count), gpu)
        one = sum(moving(1, 1).values())
        return self.phase(moving(at_once, n), one, read + written, flops, taken)

    def phase(
        self, moving: Mapping[str, float], one: float, tokens: float, flops: float, taken: float | None
    ) -> Phase:
        """With so many bytes that come and go, by part, and `one` at least."""
        held, most = sum(self.held.values()), sum(moving.values())
        margin = _margin(self.device, most)
        return Phase(
            self.name, {**self.held, **moving}, margin, needed=held + most + margin, smallest=held + one,
            tokens=tokens, flops=flops, hours=taken, note=self.note,
        )  # fmt: skip


def _margin(device: Device, moving: float) -> float:
    return (CUDA_CONTEXT if device.cuda else PROCESS) + FRAGMENTATION * moving


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
