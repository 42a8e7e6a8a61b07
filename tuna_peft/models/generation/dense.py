"""A dense copy of a model's weights while it generates: no layer is dequantized again for every token.

A decoding step computes a few rows, so in a quantized stack dequantization and the LoRA products take most of its
time. `stream_responses` calls `dense_weights` for as long as it generates.

- fp32: one matrix for each linear layer, W + sum of s B A: the same sum as before, rounded in fp32.
- 16 bits: the dequantized W alone. Its sum with the adapters would be rounded to 16 bits, which loses a part of a
  small update, so LoRA layers still add theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from tuna_peft.limits import DENSE_COPY
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.base.memory import free_bytes
from tuna_peft.models.base.shards import is_sharded
from tuna_peft.models.forward.fused_lora import adds_plain_lora
from tuna_peft.models.forward.scoring import without_peft


@contextlib.contextmanager
def dense_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within it, the linear layers of `model` compute with dense weights; adapters must not be switched or trained.

    Modules and parameters stay as they are; only the layers' `forward` is replaced.
    """
    layers = _layers(model)
    try:
        for layer in layers:
            plain = _plain(layer)
            weight = _summed(layer) if isinstance(layer, LoraLayer) else dequantised_weight(layer)
            layer.forward = partial(linear, weight=weight.to(without_peft(model).dtype), bias=plain.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # that of its class counts again


def has_room_for_dense(model: torch.nn.Module) -> bool:
    """Whether `dense_weights` would speed `model` up, and its copy fits into the share `DENSE_COPY` of free memory."""
    numbers = sum(_plain(layer).in_features * _plain(layer).out_features for layer in _layers(model))
    device = next(model.parameters()).device
    if not numbers or device.type not in ("cpu", "cuda"):
        return False
    return numbers * without_peft(model).dtype.itemsize <= DENSE_COPY * free_bytes(device)


def _layers(model: torch.nn.Module) -> list[Any]:
    """The layers that a dense weight makes faster; none of them lies inside another."""
    dtype = without_peft(model).dtype
    if is_sharded(model):
        return []
    found: dict[Any, None] = {}
    for module in model.modules():  # a layer comes before those inside it
        summable = dtype == torch.float32 and adds_plain_lora(module) and _is_linear(module.base_layer)
        if summable or (isinstance(module, Linear4bit) and _computes_in(module, dtype)):
            found[module] = None
    inside = {layer.base_layer for layer in found if isinstance(layer, LoraLayer)}
    return [layer for layer in found if layer not in inside]


def _summed(layer: Any) -> torch.Tensor:
    """`(out, in)`, in fp32: the weight of a LoRA layer's base plus the updates of its active adapters."""
    weight = dequantised_weight(layer.base_layer).float().clone()
    for name in () if layer.disable_adapters else layer.active_adapters:
        if name in layer.lora_A:
            up, down = (part[name].weight.detach().float() for part in (layer.lora_B, layer.lora_A))
            weight.addmm_(up, down, alpha=layer.scaling[name])
    return weight


def _plain(layer: Any) -> Any:
    """The linear layer inside a LoRA layer; another layer is returned unchanged."""
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def _is_linear(layer: Any) -> bool:
    """Whether it computes `W x + b` in fp32; int8 layers round activations too, and `Conv1D` has W transposed."""
    if isinstance(layer, Linear4bit):
        return _computes_in(layer, torch.float32)
    return type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32


def _computes_in(layer: Linear4bit, dtype: torch.dtype) -> bool:
    # In its first call bitsandbytes switches to the dtype of the input if that is fp32 or bf16.
    will_switch = not layer.compute_type_is_set and dtype != torch.float16
    return will_switch or layer.compute_dtype == dtype
