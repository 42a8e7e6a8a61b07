"""Memory and time of a whole run, phase by phase in their order, on a GPU or on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tuna_peft.limits import (
    ACTIVATIONS_IN_RAM,
    DENSE_COPY,
    FP32_ROWS,
    GIB,
    activation_policy,
    activations_on_gpu,
    response_room,
)
from tuna_peft.planning.flops import decode_hours, forward_flops, hours, ranking_flops, sft_flops
from tuna_peft.planning.memory import (
    FRAGMENTATION,
    Precision,
    activation_bytes,
    dense_bytes,
    generation_bytes,
    layer_bytes,
    logits_bytes,
    scoring_bytes,
)
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.sizes import sized
from tuna_peft.planning.spec import Device, JudgeSpec, RunSpec
from tuna_peft.planning.storage import disk, main_memory
from tuna_peft.planning.workload import ForwardPass, Workload, packed_pass


@dataclass
class Phase:
    """Memory and time of one part of a run.

    Attributes:
        name: For example `train sft` or `evaluate: rank`.
        parts: Bytes at the peak, by part.
        margin: Bytes of the CUDA context and of fragmentation, which `max_memory_allocated` does not show.
        needed: Minimum memory in bytes: without activations that `auto` keeps because there is free memory.
        smallest: Bytes of tensors with the smallest forward passes that the phase can use.
        tokens: Tokens that are computed.
        flops: FLOPs of the phase.
        hours: None where the device's speed is unknown.
        steps: Optimizer steps; None for a phase that does not train.
        note: A remark for the reader.
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
        """Bytes of tensors at the peak, comparable with `torch.cuda.max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """Bytes of memory at the peak, the margin included."""
        return self.allocated + self.margin


def training(run: RunSpec, index: int, device: Device) -> Phase:
    """The training of stage `index`."""
    stage, below, shape = run.stages[index], run.below(index), run.shape
    fixed = run.trained_weights(index)
    batch = stage.largest_pass

    def activations(batch: ForwardPass, kept: int) -> float:
        return activation_bytes(
            shape, batch, run.precision, stage.adapter, below, kept, supervised=stage.kind == "sft"
        )

    kept = _kept_layers(run, index, device, sum(fixed.values()))
    temporary = activations(batch, kept)
    # Activations that `auto` keeps because there is free memory are not needed.
    minimum = activations(batch, 0) if stage.activation_memory == "auto" else temporary
    if stage.auto_tokens:  # less memory would have given smaller passes
        minimum = activations(stage.smallest_pass, 0 if stage.activation_memory == "auto" else kept)
    count = sft_flops if stage.kind == "sft" else ranking_flops
    rows = stage.workload
    flops = count(shape, rows, stage.adapter, below, kept) * stage.rows_seen
    if stage.reference:  # once for each example
        flops += forward_flops(shape, rows.tokens, rows.response_tokens) * min(stage.rows_seen, rows.total)
    return Phase(
        f"train {stage.name}",
        {**fixed, f"activations of {batch.positions:,} tokens": temporary},
        _margin(device, temporary),
        needed=sum(fixed.values()) + minimum + _margin(device, minimum),
        smallest=sum(fixed.values()) + activations(stage.smallest_pass, 0 if stage.kind == "ranking" else kept),
        tokens=rows.tokens * stage.rows_seen,
        flops=flops,
        hours=hours(flops / stage.processes, device.gpu) if device.gpu else None,
        steps=stage.steps,
        note=f"{kept}/{shape.layers} layers keep activations",
    )


def _kept_layers(run: RunSpec, index: int, device: Device, fixed: float) -> int:
    """Layers that keep their activations in the largest forward pass, as `training/activation_memory.py` chooses them.

    Args:
        fixed: Bytes of weights, adapters, gradients and optimizer states.
    """
    stage, below, layers = run.stages[index], run.below(index), run.shape.layers
    setting, batch = activation_policy(stage.activation_memory), stage.largest_pass
    if setting == "full":
        return layers
    if setting == "none":
        return 0
    if setting != "auto":
        budget = float(setting) * GIB
    elif device.cuda:
        recomputing = activation_bytes(run.shape, batch, run.precision, stage.adapter, below)
        budget = activations_on_gpu(stage.processes) * device.free(fixed) - recomputing
    else:
        budget = ACTIVATIONS_IN_RAM * device.free(fixed) / stage.processes
    layer = layer_bytes(run.shape, batch, run.precision, stage.adapter, below)
    return max(min(int(budget / layer), layers), 0)


@dataclass(frozen=True)
class Inference:
    """A phase without gradients: which model computes, and what else is in memory.

    Attributes:
        name: Name of the phase.
        fixed: Bytes of the weights of all loaded models, by part.
        shape: The model that computes.
        precision: How that model is stored.
        device: Where it computes.
        times: Number of times that the work is done, for example once for each stage.
        note: A remark for the reader.
        auto: Whether the batch size follows the memory: less of it would have given a smaller one.
    """

    name: str
    fixed: Mapping[str, float]
    shape: ModelShape
    precision: Precision
    device: Device
    times: int = 1
    note: str = ""
    auto: bool = False

    def scoring(self, workload: Workload, batch_size: int, max_tokens: int | None = None) -> Phase:
        """Log-probabilities of responses, `batch_size` packed sequences and at most `max_tokens` tokens at a time."""
        batch = packed_pass(workload.rows, batch_size, max_tokens)
        temporary = scoring_bytes(self.shape, batch, self.precision)
        one = scoring_bytes(self.shape, packed_pass(workload.rows, 1, None), self.precision)
        count = workload.total * self.times
        tokens = workload.tokens * count
        flops = forward_flops(self.shape, tokens, workload.response_tokens * count)
        gpu = self.device.gpu
        parts = {f"a forward pass of {batch.positions:,} tokens": temporary}
        return self._phase(parts, one, tokens, flops, hours(flops, gpu) if gpu else None)

    def generation(
        self, workload: Workload, new: int, prompts: int, n: int = 1, *, greedy: bool = True, top_p: bool = False
    ) -> Phase:
        """`n` responses to every prompt, `prompts` prompts at a time; an upper bound, as each has `new` tokens."""
        longest = max(row.prompt for row in workload.rows)
        if context := self.shape.context:  # a response ends with it
            longest = min(longest, context - 1)
        new_tokens = response_room(new, longest, context)

        def temporary(prompts: int, n: int) -> dict[str, float]:
            return generation_bytes(
                self.shape,
                self.precision,
                prompts=prompts,
                n=n,
                prompt=longest,
                new=new_tokens,
                greedy=greedy,
                top_p=top_p,
            )

        # As `has_room_for_dense` decides; the copy is not needed, so the run fits without it.
        dense = dense_bytes(self.shape, self.precision)
        if dense > DENSE_COPY * self.device.free(sum(self.fixed.values())):
            dense = 0.0
        at_once = min(prompts, workload.total)
        count = workload.total * self.times
        steps = math.ceil(workload.total / prompts) * self.times * new
        prompt_tokens = count * workload.prompt_tokens
        generated = float(count * n * new)
        flops = forward_flops(self.shape, prompt_tokens + generated, count + generated)
        duration = None
        if gpu := self.device.gpu:
            cached = at_once * n * (workload.prompt_tokens + new / 2)
            duration = decode_hours(self.shape, self.precision, steps, at_once * n, cached, gpu, dense=dense > 0)
            duration += hours(forward_flops(self.shape, prompt_tokens, count), gpu)
            if gpu.measured:  # on a GPU they take less time than reading the weights
                duration += hours(forward_flops(self.shape, generated, generated), gpu)
        one = sum(temporary(1, 1).values())
        phase = self._phase(temporary(at_once, n), one, prompt_tokens + generated, flops, duration)
        if dense:
            phase.parts["dense copy of the layers"] = dense
        return phase

    def logits(self, lengths: Sequence[int]) -> Phase:
        """Logits of all tokens of some texts in fp32, one text at a time."""
        longest, tokens = max(lengths), float(sum(lengths))
        in_fp32 = replace(self.precision, compute=4)
        parts = {f"all logits of {longest:,} tokens": logits_bytes(self.shape, longest, in_fp32)}
        if self.precision != in_fp32:
            parts["rows of the head in fp32"] = 4.0 * min(self.shape.head, FP32_ROWS * self.shape.hidden)
        flops = forward_flops(self.shape, tokens, tokens)
        duration = hours(flops, self.device.gpu) if self.device.gpu else None
        # No minimum is known: the run may choose other texts than the longest.
        return self._phase(parts, 0.0, tokens, flops, duration)

    def _phase(
        self, temporary: Mapping[str, float], one: float, tokens: float, flops: float, duration: float | None
    ) -> Phase:
        """The phase with these bytes beyond the weights; with the smallest batch they are `one`."""
        fixed, peak = sum(self.fixed.values()), sum(temporary.values())
        margin = _margin(self.device, peak)
        needed = fixed + peak + margin
        if self.auto:
            needed = min(needed, fixed + one + _margin(self.device, 0))
        return Phase(
            self.name, {**self.fixed, **temporary}, margin, needed=needed, smallest=fixed + one,
            tokens=tokens, flops=flops, hours=duration, note=self.note,
        )  # fmt: skip


def _margin(device: Device, temporary: float) -> float:
    return device.overhead + FRAGMENTATION * temporary


@dataclass
class Plan:
    """All phases of a run on one device.

    Attributes:
        run: The run.
        device: Where it runs.
        phases: Its phases, in order.
        ram: Bytes of main memory beside a GPU, by purpose.
        disk: Bytes of disk, by purpose.
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
        """Minimum memory in bytes."""
        return self.largest.needed

    @property
    def peak(self) -> float:
        """Bytes of memory that the run will use."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the device's memory."""
        return self.needed <= self.device.memory

    @property
    def hours(self) -> float | None:
        """Hours of all phases; None where the speed is unknown."""
        known = [phase.hours for phase in self.phases]
        return None if None in known else sum(hour for hour in known if hour is not None)


def make_plan(run: RunSpec, device: Device) -> Plan:
    """Predicts memory and time of a run on a device."""
    run = sized(run, device)
    phases: list[Phase] = []
    for index in range(len(run.stages)):
        phases += [*_ranking_phases(run, index, device), training(run, index, device)]
    phases += [*_evaluation_phases(run, device), *_comparison(run, device)]
    return Plan(run, device, phases, main_memory(run, device), disk(run, device))


def _ranking_phases(run: RunSpec, index: int, device: Device) -> Iterator[Phase]:
    """Sampling and ranking of a stage's training data; a teacher or judge is loaded beside the run's own model."""
    stage, weights = run.stages[index], run.weights(index)
    prompts = stage.prompt_workload
    if prompts is None:
        return
    if (sample := stage.sample) is not None:
        note = f"up to {sample.attempts} attempts" if sample.attempts > 1 else ""
        name = f"sample {stage.name}"
        inference = Inference(name, weights, run.shape, run.precision, device, note=note, auto=sample.auto)
        yield inference.generation(
            prompts, sample.new_tokens, sample.prompts_at_once, sample.n, greedy=False, top_p=sample.top_p
        )
    if (teacher := stage.teacher) is not None:
        name, model = f"score {stage.name}", teacher.model
        inference = Inference(name, weights | model.parts, model.shape, model.precision, device, auto=teacher.auto)
        yield inference.scoring(prompts, prompts.total, teacher.max_tokens)
    if stage.judge is not None:
        yield _judging(f"judge {stage.name}", weights, stage.judge, device)


def _judging(name: str, weights: dict[str, float], judge: JudgeSpec, device: Device, times: int = 1) -> Phase:
    model, note = judge.model, f"{times} times" if times > 1 else ""
    inference = Inference(name, weights | model.parts, model.shape, model.precision, device, times, note, judge.auto)
    return inference.generation(judge.questions, judge.new_tokens, judge.batch_size, greedy=judge.greedy)


def _evaluation_phases(run: RunSpec, device: Device) -> Iterator[Phase]:
    """The phases of all tasks, each for the base and every stage."""
    times, weights = len(run.stages) + 1, run.weights(len(run.stages))
    for name, task in run.evaluation.items():
        inference = Inference(
            f"evaluate: {name}", weights, run.shape, run.precision, device, times, f"{times} times", task.auto
        )
        if task.new_tokens is None:
            yield inference.scoring(task.workload, task.batch_size)
        else:
            yield inference.generation(task.workload, task.new_tokens, task.batch_size)
        if task.judge is not None:
            yield _judging(f"judge {name}", weights, task.judge, device, times)


def _comparison(run: RunSpec, device: Device) -> Iterator[Phase]:
    """Logits of the unmerged adapters, with which exports are compared. The merged model uses what memory is free, see
    `storage`."""
    if run.compared:
        weights = run.weights(len(run.stages))
        yield Inference("compare exports", weights, run.shape, run.precision, device).logits(run.compared)
