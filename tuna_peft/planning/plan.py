"""Memory and time of a whole run, phase by phase, on a card or in main memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tuna_peft.planning.flops import decode_hours, forward_flops, hours, ranking_flops, sft_flops
from tuna_peft.planning.gpus import GIB, Gpu
from tuna_peft.planning.inference import generation_bytes, scoring_bytes
from tuna_peft.planning.memory import (
    Adapter,
    Precision,
    activation_bytes,
    frozen_parts,
    layer_bytes,
    trainer_parts,
    weight_parts,
)
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass, Workload, packed_pass, padded_pass

# What the CUDA context, the libraries' kernels and their workspaces take of a card: 0.35 to 0.6 GiB on cards that
# others have reported; not measured here.
CUDA_CONTEXT = 0.5 * GIB
# Blocks that the allocator cannot use, as a share of what comes and goes.
FRAGMENTATION = 0.08
# Of what is left for kept activations, as `training/activation_memory.py` has it; a test compares them.
USABLE, USABLE_RAM = 0.92, 0.5
# Python with torch, transformers and the rest, before any model, and what its allocator keeps (the quickstart on CPU).
PROCESS = 0.8 * GIB
# Main memory for each parameter of a layer that is merged into 16 bits, measured (`python -m benchmarks.merge`).
MERGED = 13.7


@dataclass(frozen=True)
class StageSpec:
    """A stage of training.

    Attributes:
        kind: `sft` or `ranking`.
        adapter: The one that it trains; those below it are frozen.
        activation_memory: As `TunaConfig` has it: `auto`, `full`, `none`, or GiB for kept activations.
        processes: GPUs that share the work.
        continues: Its adapter takes the place of the one of the stage before.
    """

    name: str
    kind: str
    workload: Workload
    adapter: Adapter
    batch_size: int
    accumulation: int
    max_tokens: int | None
    activation_memory: str | float
    optimizer: str
    epochs: float
    max_steps: int
    processes: int = 1
    continues: bool = False

    @property
    def largest_pass(self) -> ForwardPass:
        """The forward pass that decides about memory."""
        if self.kind == "sft":
            return padded_pass(self.workload.rows, self.batch_size)
        return packed_pass(self.workload.rows, self.batch_size, self.max_tokens)

    @property
    def smallest_pass(self) -> ForwardPass:
        """The longest row alone: a ranking step that runs out of memory is split down to it."""
        if self.kind == "sft":
            return self.largest_pass
        return packed_pass(self.workload.rows, 1, None)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        if self.max_steps > 0:
            return self.max_steps
        rows = self.batch_size * self.accumulation * self.processes
        return math.ceil(self.workload.total / rows * self.epochs)

    @property
    def rows_seen(self) -> float:
        """Rows computed in the stage, repetitions included."""
        return float(self.steps * self.batch_size * self.accumulation * self.processes)


@dataclass(frozen=True)
class TaskSpec:
    """One thing that is measured: responses are scored, or `new_tokens` generated for each prompt."""

    workload: Workload
    new_tokens: int | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """What is measured of the base and after every stage."""

    batch_size: int
    tasks: dict[str, TaskSpec]


@dataclass(frozen=True)
class MergeSpec:
    """The merged model, written tensor by tensor."""

    bytes_per_parameter: float = 2.0


@dataclass(frozen=True)
class RunSpec:
    """A run as the arithmetic sees it.

    Attributes:
        downloads: Whether the base is on the Hub, and not in its cache yet.
    """

    model: str
    shape: ModelShape
    precision: Precision
    stages: tuple[StageSpec, ...]
    evaluation: EvaluationSpec | None = None
    merge: MergeSpec | None = None
    downloads: bool = True

    def below(self, index: int) -> list[Adapter]:
        """The adapters under stage `index`."""
        return self.stack(index + 1)[:-1]

    def stack(self, count: int) -> list[Adapter]:
        """The adapters that the model holds after `count` stages."""
        adapters: list[Adapter] = []
        for stage in self.stages[:count]:
            if stage.continues:
                adapters.pop()
            adapters.append(stage.adapter)
        return adapters


@dataclass(frozen=True)
class Device:
    """Where the run happens.

    Attributes:
        name: For the reader.
        memory: Bytes that a program can have.
        gpu: Its data sheet; None for a CPU or an unknown card, whose speed is not predicted.
        cuda: Whether it is a GPU at all.
        bf16: Whether it has bf16 of its own.
    """

    name: str
    memory: float
    gpu: Gpu | None = None
    cuda: bool = True
    bf16: bool = True

    @classmethod
    def of(cls, gpu: Gpu) -> Device:
        """A card from the table."""
        return cls(gpu.name, gpu.memory_gib * GIB, gpu, bf16=gpu.bf16)


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
    phases = [_training(run, index, device) for index in range(len(run.stages))]
    phases += _evaluation(run, device)
    return Plan(run, device, phases, _ram(run, device), _disk(run))


def _training(run: RunSpec, index: int, device: Device) -> Phase:
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
    setting, batch = stage.activation_memory, stage.largest_pass
    if setting == "full":
        return layers
    if setting == "none" or (setting == "auto" and stage.processes > 1):
        return 0
    if setting != "auto":
        budget = float(setting) * GIB
    elif device.cuda:
        recomputing = activation_bytes(run.shape, batch, run.precision, stage.adapter, below)
        budget = USABLE * (device.memory - CUDA_CONTEXT - held) - recomputing
    else:
        budget = USABLE_RAM * (device.memory - PROCESS - held)
    layer = layer_bytes(run.shape, batch, run.precision, stage.adapter, below)
    return max(min(int(budget / layer), layers), 0)


def _evaluation(run: RunSpec, device: Device) -> list[Phase]:
    settings, shape = run.evaluation, run.shape
    if settings is None:
        return []
    held = weight_parts(shape, run.precision)
    held |= frozen_parts(run.stack(len(run.stages)), run.precision)
    return [
        _generation(run, device, settings.batch_size, name, task, task.new_tokens, held)
        if task.new_tokens is not None
        else _scoring(run, device, settings.batch_size, name, task, held)
        for name, task in settings.tasks.items()
    ]


def _scoring(
    run: RunSpec, device: Device, batch_size: int, name: str, task: TaskSpec, held: dict[str, float]
) -> Phase:
    shape, rows = run.shape, task.workload.rows
    batch = packed_pass(rows, batch_size, None)
    moving, one = (scoring_bytes(shape, it, run.precision) for it in (batch, packed_pass(rows, 1, None)))
    times = len(run.stages) + 1
    count = task.workload.total * times
    flops = forward_flops(shape, task.workload.tokens * count, task.workload.response_tokens * count)
    return Phase(
        f"evaluate: {name}",
        {**held, f"a forward pass of {batch.positions:,} tokens": moving},
        margin := _margin(device, moving),
        needed=sum(held.values()) + moving + margin,
        smallest=sum(held.values()) + one,
        tokens=task.workload.tokens * count,
        flops=flops,
        hours=hours(flops, device.gpu) if device.gpu else None,
        note=f"{times} times",
    )


def _generation(
    run: RunSpec, device: Device, batch_size: int, name: str, task: TaskSpec, new: int, held: dict[str, float]
) -> Phase:
    shape, prompts = run.shape, task.workload
    prompt = max(row.prompt for row in prompts.rows)

    def moving(sequences: int) -> dict[str, float]:
        return generation_bytes(shape, run.precision, prompts=sequences, n=1, prompt=prompt, new=new)

    most, least = sum(moving(batch_size).values()), sum(moving(1).values())
    times = len(run.stages) + 1
    steps = math.ceil(prompts.total / batch_size) * times * new
    body = sum(weight_parts(shape, run.precision).values())
    tokens = float(prompts.total * new * times)
    return Phase(
        f"evaluate: {name}",
        {**held, **moving(batch_size)},
        margin := _margin(device, most),
        needed=sum(held.values()) + most + margin,
        smallest=sum(held.values()) + least,
        tokens=tokens,
        flops=forward_flops(shape, tokens, tokens),
        hours=decode_hours(shape, steps, body, device.gpu) if device.gpu else None,
        note=f"{times} times",
    )


def _margin(device: Device, moving: float) -> float:
    return (CUDA_CONTEXT if device.cuda else PROCESS) + FRAGMENTATION * moving


def _ram(run: RunSpec, device: Device) -> dict[str, float]:
    shape = run.shape
    largest = max(shape.head, shape.largest_linear)
    ram = {"while loading: the largest tensor, 16-bit and as it is stored": PROCESS + 4.0 * largest}
    if run.merge is not None:
        # One tensor at a time: the embedding as it is, or a linear layer quantised, dequantised and added up.
        more = max(run.merge.bytes_per_parameter - 2.0, 0.0)
        copied = run.merge.bytes_per_parameter if more else 0.0
        ram["merge"] = PROCESS + max((2.0 + copied) * shape.head, (MERGED + more) * shape.largest_linear)
    if not device.cuda:
        ram = {}  # it is all in the phases
    return ram


def _disk(run: RunSpec) -> dict[str, float]:
    parameters = run.shape.body + run.shape.unquantised
    adapters = sum(stage.adapter.parameters for stage in run.stages)
    # A checkpoint holds the whole stack and the optimiser.
    checkpoint = 4.0 * adapters + max(8.0 * stage.adapter.parameters for stage in run.stages)
    disk = {"the base, 16-bit, downloaded into the Hub's cache": 2.0 * parameters} if run.downloads else {}
    disk |= {
        "adapters, and the combined one": 2 * 4.0 * adapters,
        "checkpoints: one of each stage, one more while it is written": (len(run.stages) + 1) * checkpoint,
    }
    if run.merge is not None:
        disk["the merged model"] = float(run.merge.bytes_per_parameter * parameters)
    return disk
