"""One arm on one device: FLOPs and peak memory from a pass of their own, time from interleaved repetitions."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.arms import ARMS, Loss, to_device
from benchmarks.flops import counted, training_state_bytes, weight_bytes
from benchmarks.memory import LiveBytes
from benchmarks.meta import meta_step
from benchmarks.shapes import set_checkpointing, set_fused
from benchmarks.workloads import Group
from tuna_peft.data.batch import PackedBatch
from tuna_peft.limits import GIB
from tuna_peft.training.activation_memory import GIB, ActivationMemory

SPARE = 2 * GIB  # context, workspaces and fragmentation, left free on a card


@dataclass
class Figures:
    """What an arm costs for all groups of a run.

    Attributes:
        flops: By the mathematics of what is computed, see `flops.counted`.
        kernel_flops: With what fused attention recomputes inside its backward pass.
        peak_bytes: Most bytes alive of one micro-batch beyond weights, adapters, gradients and optimiser.
        seconds: Of each repetition, over all groups; empty on meta.
    """

    checkpointing: bool
    flops: float
    kernel_flops: float
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """Seconds of the repetition in the middle."""
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median_seconds": self.median}


class Runner:
    """Steps of every arm on one model, with one optimiser each.

    Args:
        model: See `shapes.build`.
        device: `cpu`, `cuda` or `meta`.
        micro_batches: The groups, as they are computed together.
        checkpointing: For the arms that may.
        equal_lengths: Whether rows need no padding.
    """

    def __init__(
        self, model: Any, device: str, micro_batches: list[list[Group]], *, checkpointing: bool, equal_lengths: bool
    ) -> None:
        self.model, self.device, self.micro_batches = model, device, micro_batches
        self.checkpointing, self.equal_lengths = checkpointing, equal_lengths
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._activations: ActivationMemory | None = None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        for parameter in self.parameters:  # so that no first step has to allocate them
            parameter.grad = torch.zeros_like(parameter)

    def count(self, name: str) -> Figures:
        """FLOPs and peak memory. This is a warm-up too."""
        loss, batches, checkpointing = self._prepare(name)
        with counted() as flops:
            self._step(loss, batches)
        return Figures(checkpointing, flops.model, flops.kernel, self._peak(loss, batches))

    def time(self, name: str) -> float:
        """Seconds of forward and backward over all micro-batches and one optimiser step."""
        loss, batches, _ = self._prepare(name)
        self._synchronise()
        start = time.perf_counter()
        self._step(loss, batches)
        self.optimizer.step()
        self._synchronise()
        elapsed = time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=False)
        return elapsed

    def _prepare(self, name: str) -> tuple[Loss, list[dict[str, Any]], bool]:
        arm = ARMS[name]
        checkpointing = self.checkpointing and arm.checkpointing
        if self._activations is not None:
            self._activations.detach()
        set_checkpointing(self.model, checkpointing)
        set_fused(self.model, arm.fused)
        batches = [to_device(arm.batch(groups), self.device) for groups in self.micro_batches]
        loss = arm.loss(self.model, self.device)
        if arm.card is not None and checkpointing:
            config = self.model.get_base_model().config
            taken = weight_bytes(config) + training_state_bytes(config) + self._peak(loss, batches) + SPARE
            self._activations = ActivationMemory(max(arm.card - taken, 0.0) / GIB)
            self._activations.attach(self.model)
        return loss, batches, checkpointing

    def _step(self, loss: Loss, batches: list[dict[str, Any] | PackedBatch]) -> None:
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()
        with meta_step(self.equal_lengths) if self.device == "meta" else nullcontext():
            for batch in batches:
                with autocast:
                    value = loss(batch)
                (value / len(batches)).backward()

    def _peak(self, loss: Loss, batches: list[dict[str, Any] | PackedBatch]) -> int:
        largest = max(batches, key=_positions)
        tensors = vars(largest) if isinstance(largest, PackedBatch) else largest
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._step(loss, [largest])
            return torch.cuda.max_memory_allocated() - before
        known = [*self.model.parameters(), *self.model.buffers(), *(parameter.grad for parameter in self.parameters)]
        with LiveBytes([*known, *(value for value in tensors.values() if isinstance(value, torch.Tensor))]) as live:
            self._step(loss, [largest])
        return live.peak

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _positions(batch: dict[str, Any] | PackedBatch) -> int:
    """Rows times width, padding included."""
    if isinstance(batch, PackedBatch):
        return batch.input_ids_BT.numel()
    keys = ["input_ids"] if "input_ids" in batch else ["chosen_input_ids", "rejected_input_ids"]
    width = max(batch[key].shape[1] for key in keys)
    return sum(len(batch[key]) for key in keys) * width
