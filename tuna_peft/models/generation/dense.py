"""A dense copy of a model's weights while it generates: no layer is dequantized again for every token.

A decoding step computes a few rows, so in a quantized stack dequantization and the LoRA products take most of its
time. `stream_responses` calls `dense_weights` for as long as it generates.

- fp32: one matrix for each linear layer, W + sum of s B A: the same sum as before, rounded in fp32.
- fp32 on a CPU with AVX2, from a hidden size of 512 on: the same matrix, and the head, rounded to the 11 bits of fp16.
  FBGEMM reads half as many bytes, and multiplies faster; activations and sums stay in fp32.
- 16 bits: the dequantized W alone. Its sum with the adapters would be rounded to 16 bits (8 significant ones in bf16),
  which loses a part of a small update, so LoRA layers still add theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tuna_peft.limits import DENSE_COPY, packs_fp16
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.base.load import hidden_size
from tuna_peft.models.base.memory import free_bytes
from tuna_peft.models.base.shards import is_sharded
from tuna_peft.models.forward.fused_lora import adds_plain_lora
from tuna_peft.models.forward.scoring import without_peft


@contextlib.contextmanager
def dense_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within it, the linear layers of `model` compute with dense weights; adapters must not be switched or trained.

    Modules and parameters stay as they are; only the layers' `forward` is replaced.
    """
    layers, dtype, packed = _layers(model), without_peft(model).dtype, _is_packed(model)

    def replace(layer: Any) -> None:
        layer.forward = _dense_forward(layer, dtype, packed=packed)

    try:
        if packed:  # which FBGEMM does on one thread, 12 ns a weight
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(replace, layers))
        else:
            for layer in layers:
                replace(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # that of its class counts again


@torch.no_grad()
def _dense_forward(layer: Any, dtype: torch.dtype, *, packed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = _summed(layer) if isinstance(layer, LoraLayer) else dequantised_weight(layer)
    bias = _plain(layer).bias
    if packed:
        both = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        return partial(torch.ops.quantized.linear_dynamic_fp16, W_prepack=both)
    return partial(linear, weight=weight.to(dtype), bias=bias)


def has_room_for_dense(model: torch.nn.Module) -> bool:
    """Whether `dense_weights` would speed `model` up, and its copy fits into the share `DENSE_COPY` of free memory."""
    numbers = sum(_plain(layer).in_features * _plain(layer).out_features for layer in _layers(model))
    device = next(model.parameters()).device
    if not numbers or device.type not in ("cpu", "cuda"):
        return False
    each = 2 if _is_packed(model) else without_peft(model).dtype.itemsize
    return numbers * each <= DENSE_COPY * free_bytes(device)


def _is_packed(model: torch.nn.Module) -> bool:
    """Whether the copy is in fp16 for FBGEMM."""
    whole, engine = without_peft(model), torch.backends.quantized.engine
    if not isinstance(whole, PreTrainedModel) or whole.device.type != "cpu" or engine not in ("x86", "fbgemm"):
        return False
    return whole.dtype == torch.float32 and packs_fp16(hidden_size(whole.config) or 0)


def _layers(model: torch.nn.Module) -> list[Any]:
    """The layers that a dense weight makes faster; none of them lies inside another."""
    return [] if is_sharded(model) else list(_found(model, without_peft(model).dtype, packed=_is_packed(model)))


def _found(module: Any, dtype: torch.dtype, *, packed: bool) -> Iterator[Any]:
    is_lora = isinstance(module, LoraLayer)
    summable = dtype == torch.float32 and adds_plain_lora(module) and _is_linear(module.base_layer)
    dequantized = isinstance(module, Linear4bit) and _computes_in(module, dtype)
    if summable or dequantized or (packed and _is_linear(module)):
        yield module
        return
    for child in (module.base_layer,) if is_lora else module.children():
        yield from _found(child, dtype, packed=packed)


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
