"""Measures one arm on one device: FLOPs and peak memory in separate passes, time in interleaved repetitions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
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
from tuna_peft.models.forward.compiled import compile_layers
from tuna_peft.training.activation_memory import ActivationMemory

SPARE = 2 * GIB  # GPU memory that is left free for the CUDA context, workspaces and fragmentation


@dataclass
class Figures:
    """The cost of an arm for all data of a run.

    Attributes:
        checkpointing: Whether it used gradient checkpointing.
        flops: FLOPs that the mathematics requires, see `flops.counted`.
        kernel_flops: FLOPs including those that fused attention recomputes in its backward pass.
        peak_bytes: Peak bytes of one micro-batch beyond weights, adapters, gradients and optimizer states.
        seconds: Time of each repetition; empty on the `meta` device.
    """

    checkpointing: bool
    flops: float
    kernel_flops: float
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """Median seconds of the repetitions."""
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {**asdict(self), "median_seconds": self.median}


class Runner:
    """Runs the steps of all arms on one model and optimizer.

    Args:
        model: See `shapes.build`.
        device: `cpu`, `cuda` or `meta`.
        micro_batches: Prompts with their responses, by forward pass.
        checkpointing: Whether arms that allow it use gradient checkpointing.
        equal_lengths: Whether no sequence needs padding.
    """

    def __init__(
        self, model: Any, device: str, micro_batches: list[list[Group]], *, checkpointing: bool, equal_lengths: bool
    ) -> None:
        self.model, self.device, self.micro_batches = model, device, micro_batches
        self.checkpointing, self.equal_lengths = checkpointing, equal_lengths
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._activations: ActivationMemory | None = None
        self._restore: Callable[[], None] | None = None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        for parameter in self.parameters:  # allocated now, so that the first step does not differ from others
            parameter.grad = torch.zeros_like(parameter)

    def count(self, name: str) -> Figures:
        """FLOPs and peak memory of an arm. It also serves as warm-up."""
        loss, batches, checkpointing = self._prepare(name)
        with counted() as flops:
            self._step(loss, batches)
        return Figures(checkpointing, flops.model, flops.kernel, self._peak(loss, batches))

    def time(self, name: str) -> float:
        """Seconds of forward and backward passes over all micro-batches and one optimizer step."""
        step = self.prepared(name)
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def prepared(self, name: str) -> Callable[[], None]:
        """A function that computes one step of an arm, the optimizer's included, until the device has done it."""
        loss, batches, _ = self._prepare(name)

        def step() -> None:
            self._step(loss, batches)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
            self._synchronise()

        self._synchronise()
        return step

    def _prepare(self, name: str) -> tuple[Loss, list[dict[str, Any]], bool]:
        arm = ARMS[name]
        checkpointing = self.checkpointing and arm.checkpointing
        if self._activations is not None:
            self._activations.detach()
        self.model.get_base_model().set_attn_implementation("sdpa")  # ours registers its own in the first pass
        set_checkpointing(self.model, checkpointing)
        set_fused(self.model, arm.fused)
        if self._restore is not None:
            self._restore()
        self._restore = compile_layers(self.model) if arm.compiled and self.device == "cuda" else None
        batches = [to_device(arm.batch(groups), self.device) for groups in self.micro_batches]
        loss = arm.loss(self.model, self.device)
        if arm.gpu_bytes == "auto" and checkpointing:
            self._measure_free_memory(loss, batches)
        elif arm.gpu_bytes is not None and checkpointing:
            config = self.model.get_base_model().config
            taken = weight_bytes(config) + training_state_bytes(config) + self._peak(loss, batches) + SPARE
            self._activations = ActivationMemory(max(arm.gpu_bytes - taken, 0.0) / GIB)
            self._activations.attach(self.model)
        return loss, batches, checkpointing

    def _measure_free_memory(self, loss: Loss, batches: list[dict[str, Any] | PackedBatch]) -> None:
        """Keeps activations as `activation_memory: auto` does; on a GPU its first step measures what is free.

        On `meta`, which has no memory, all layers keep them.
        """
        self._activations = ActivationMemory("full" if self.device == "meta" else "auto")
        self._activations.attach(self.model)
        if self.device == "cuda":
            self._step(loss, batches)
            self.optimizer.step()
            arguments = SimpleNamespace(device=torch.device("cuda", torch.cuda.current_device()))
            self._activations.on_step_end(arguments, None, None, optimizer=self.optimizer)
            self.optimizer.zero_grad(set_to_none=False)

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
