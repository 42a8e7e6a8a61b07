"""Simulates a step on PyTorch's `meta` device, at full size without weights, to count FLOPs and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode

_SCALARS = {torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__float__}


class MetaStep(TorchFunctionMode):
    """Returns values for operators that need the values of a tensor, which `meta` tensors do not have.

    Args:
        truth: The result of conditions on values. The only one that matters is "does this padding mask hide
            nothing?", so it says whether all sequences have equal lengths.
    """

    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.truth = truth

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and args[0].is_meta:
            return torch.zeros(args[0].shape).tolist()
        if func in _SCALARS and args[0].is_meta:
            return self.truth if func is torch.Tensor.__bool__ else float(self.truth)
        if func is torch.bincount and args[0].is_meta:
            return torch.empty(kwargs["minlength"], dtype=torch.long, device="meta")
        return func(*args, **kwargs)


@contextlib.contextmanager
def meta_step(equal_lengths: bool) -> Iterator[None]:
    """Runs code on the `meta` device, see `MetaStep`. A boolean index selects everything.

    Attention uses as much memory as CUDA's memory-efficient kernel: on `meta`, `scaled_dot_product_attention` would
    keep all scores, which it does on no GPU. The function is patched by name, because recomputed layers (gradient
    checkpointing) ignore function modes.
    """
    with (
        MetaStep(equal_lengths),
        mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", True),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _efficient_attention),
        mock.patch.object(torch, "is_autocast_enabled", _is_autocast_enabled),
    ):
        yield


_is_autocast_enabled_elsewhere = torch.is_autocast_enabled


def _is_autocast_enabled(*device: str) -> bool:
    """False on `meta`, where torch raises an error instead."""
    return "meta" not in device and _is_autocast_enabled_elsewhere(*device)


def _efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    bias = None
    if attn_mask is not None:
        # As on CUDA: a boolean mask becomes an additive one in the query's dtype, shared by all heads.
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.empty(bias.shape, dtype=query.dtype, device=query.device).masked_fill_(bias, 0.0)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
