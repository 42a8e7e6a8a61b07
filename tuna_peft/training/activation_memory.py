"""Gradient checkpointing by a memory budget: as many layers as fit keep their activations, the others recompute them.

A layer that keeps its activations saves a third of the layer's work. Their size is measured on the loaded model (one
layer runs once while its saved tensors are counted), so it is right for any architecture, attention kernel and adapter
stack. The choice is repeated for each forward pass, from its number of tokens. It changes memory and time, not the
results.

`TunaTrainer` adds `ActivationMemory` to its callbacks.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils._pytree import tree_iter
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from tuna_peft.limits import ACTIVATIONS_IN_RAM, GIB, activation_policy, activations_on_gpu, available_ram
from tuna_peft.models.base.memory import free_bytes
from tuna_peft.models.forward.compiled import decoder_layers

logger = logging.getLogger("tuna_peft")


class ActivationMemory(TrainerCallback):
    """Decides before each training pass which layers keep their activations.

    Args:
        setting: GiB for kept activations; or `"full"` (keep all), `"none"` (every layer recomputes), or `"auto"`: use
            the free memory of the device. On a GPU that is what the first step, in which every layer recomputes,
            leaves free; on a CPU half of the free memory.
        processes: Number of processes. With several, the least free memory of all counts, with a larger margin: they
            cannot repeat a step that runs out of memory.
        sharded: Whether they share one base. `"auto"` means `"none"` then: a layer that is recomputed gathers its
            weights from all processes, so all would have to choose the same.
    """

    def __init__(self, setting: str | float, processes: int = 1, *, sharded: bool = False) -> None:
        self.setting = activation_policy(setting, sharded=sharded)
        self._processes = processes
        self._most = float("inf")  # bytes for kept activations, after running out of memory
        self._kept_bytes = 0.0
        self._layers: list[GradientCheckpointingLayer] = []
        self._hook: Any = None
        self._bytes_per_token, self._widest, self._logged = 0.0, 0, 0
        self._pass_bytes_per_token: float | None = None  # on a GPU, with every layer recomputing
        self._probe_tokens = 0
        self._left = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attaches to the model."""
        self.attach(model)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        """Measures a GPU's free memory after the first step.

        With fp16, the gradient scaler may skip the first steps. The optimizer has no states then and will still
        allocate them, so the measurement waits for a step that counts.
        """
        if self.setting == "auto" and self._pass_bytes_per_token is None and self._probe_tokens and optimizer.state:
            device, share = args.device, activations_on_gpu(self._processes)
            found = (_peak(device) - self._left) / self._probe_tokens, share * free_bytes(device)
            if self._processes > 1:
                each = gather_object([found])
                found = max(size for size, _ in each), min(free for _, free in each)
            self._pass_bytes_per_token, self._left = found

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches from the model."""
        self.detach()

    def attach(self, model: Any) -> None:
        """Controls the checkpointing flags of the model's layers from now on."""
        self.detach()
        self._layers = decoder_layers(model)
        if self._layers and self.setting not in ("none", "full"):
            self._hook = self._layers[0].register_forward_pre_hook(self._choose, with_kwargs=True)
        for layer in self._layers:
            layer.gradient_checkpointing = self.setting != "full"

    def detach(self) -> None:
        """Stops choosing layers; the flags keep their values."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def release(self) -> bool:
        """After running out of memory: half as many layers keep their activations from now on, with `"full"` none.

        Returns:
            Whether that frees memory: False when no layer kept its activations, or none can recompute them.
        """
        able = [layer for layer in self._layers if hasattr(layer, "_gradient_checkpointing_func")]
        kept = not all(layer.gradient_checkpointing for layer in able)
        if kept and self._hook is not None:
            self._most = self._kept_bytes / 2
        elif kept:
            for layer in self._layers:
                layer.gradient_checkpointing = True
        return kept

    def _choose(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return  # evaluation saves no activations
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens, width = hidden.shape[0] * hidden.shape[1], hidden.shape[1]
        if width > self._widest:  # longer sequences never take less memory per token
            self._widest = width
            self._bytes_per_token = max(self._bytes_per_token, saved_bytes(layer, args, kwargs) / tokens)
        budget = min(self._budget(hidden.device, tokens), self._most)
        kept = min(int(budget / (self._bytes_per_token * tokens)), len(self._layers))
        self._kept_bytes = kept * self._bytes_per_token * tokens
        # The last layers: the backward pass frees their activations before the first layer recomputes its own.
        for index, each in enumerate(self._layers):
            each.gradient_checkpointing = index < len(self._layers) - kept
        if tokens > self._logged and (self._pass_bytes_per_token is not None or budget):
            self._logged = tokens
            logger.log(
                logging.DEBUG if kept == len(self._layers) else logging.INFO,  # the usual case is no news
                "activation memory: %d of %d layers keep their activations at %d tokens a forward pass, "
                "%.2f GiB of %.2f GiB",
                kept, len(self._layers), tokens, kept * self._bytes_per_token * tokens / GIB, budget / GIB,
            )  # fmt: skip

    def _budget(self, device: torch.device, tokens: int) -> float:
        """Bytes available for kept activations in a forward pass over `tokens` tokens."""
        if not isinstance(self.setting, str):
            return self.setting * GIB
        if device.type == "cpu":
            return ACTIVATIONS_IN_RAM * available_ram() / self._processes  # which share a machine's memory
        if self._pass_bytes_per_token is None:  # the first step measures the memory with every layer recomputing
            if not self._probe_tokens:
                self._left = _start_watching(device)
            self._probe_tokens = max(self._probe_tokens, tokens)
            return 0.0
        return max(self._left - self._pass_bytes_per_token * tokens, 0.0)


def saved_bytes(layer: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Bytes that autograd saves for a layer's backward pass, besides its inputs and weights; measured by one run."""
    before = {_storage(tensor) for tensor in [*layer.parameters(), *layer.buffers()]}
    before |= {_storage(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
    saved: dict[int, torch.Tensor] = {}  # holds the tensors too, else a storage could be freed and its address reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in before:
            saved[_storage(tensor)] = tensor
        return tensor

    flag, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        devices = [args[0].device] if args and args[0].is_cuda else []
        with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer.forward(*args, **kwargs)
    finally:
        layer.gradient_checkpointing = flag
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _start_watching(device: torch.device) -> float:
    """Bytes in use on a GPU now; resets its peak."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device)
