"""Attention by segment in 16 bits, forward and backward, beside dense attention in fp32.

On a GPU from Ampere on this is FlashAttention's variable-length kernel. The error of dense attention in the same 16
bits, by PyTorch's own kernel, says which errors are to be expected.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.steps import Arms, Setting
from benchmarks.ours import batch_of
from tuna_peft.models.forward.prefix import shared_prefix_mask
from tuna_peft.models.forward.segments import Segments, _supports_varlen, segment_attention

HEADS = 8
NAMES = ("output", "query", "key", "value")


def arms(setting: Setting) -> Arms:
    """bf16 and fp16, head sizes, windows, grouped heads and not."""
    cases = [
        (dtype, size, key_heads, window)
        for dtype in (torch.bfloat16, torch.float16)
        for size in ((64,) if setting.toy else (64, 128, 256))
        for key_heads, window in ((HEADS, None), (2, None), (2, 96))
    ]
    return {_name(*case): lambda case=case: compare(setting, *case) for case in cases}  # type: ignore[misc]


def compare(setting: Setting, dtype: torch.dtype, size: int, key_heads: int, window: int | None) -> dict[str, Any]:
    """Norm of the difference from dense fp32 attention over its norm, of the output and of three gradients."""
    device = setting.device
    batch = batch_of(setting.workload.groups(2, 97)).to(device)
    segments = Segments(batch.q_offsets, batch.k_offsets, batch.keys_K, batch.input_ids_BT.shape[1])
    mask = shared_prefix_mask(batch.segment_ids_BT, batch.position_ids_BT, batch.limits_BSS, window)
    layer = SimpleNamespace(num_key_value_groups=HEADS // key_heads, is_causal=True, segment_window=window)
    generator = torch.Generator(device).manual_seed(0)
    tokens, shape = batch.tokens_U, batch.input_ids_BT.shape
    states, grad = (
        [torch.randn(1, heads, len(tokens), size, generator=generator, device=device, dtype=dtype) for heads in many]
        for many in ((HEADS, key_heads, key_heads), (HEADS,))
    )

    def by_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return segment_attention(layer, q, k, v, None, scaling=size**-0.5, segments=segments)[0].transpose(1, 2)

    def dense(*inputs: torch.Tensor) -> torch.Tensor:
        padded = []
        for state in inputs:
            rows = state.new_zeros(shape.numel(), state.shape[1], size).index_copy(0, tokens, state[0].transpose(0, 1))
            rows = rows.view(*shape, state.shape[1], size).transpose(1, 2)
            padded.append(rows.repeat_interleave(HEADS // state.shape[1], dim=1))
        output = scaled_dot_product_attention(*padded, attn_mask=mask)
        return output.transpose(1, 2).reshape(shape.numel(), HEADS, size)[tokens].transpose(0, 1)[None]

    def results(attention: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [state.to(dtype, copy=True).requires_grad_() for state in states]
        output = attention(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad[0].to(dtype))]

    exact = results(dense, torch.float32)
    return {
        "kernel": "variable-length" if _supports_varlen(states[0], 0.0) else "a call for each segment",
        "tokens": len(tokens),
        "relative_error": _errors(results(by_segment, dtype), exact),
        "relative_error_of_dense": _errors(results(dense, dtype), exact),
        "repeats_exactly": all(
            torch.equal(*pair) for pair in zip(results(by_segment, dtype), results(by_segment, dtype), strict=True)
        ),
    }


def _errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    return {name: float((a.float() - b).norm() / b.norm()) for name, a, b in zip(NAMES, found, exact, strict=True)}


def _name(dtype: torch.dtype, size: int, key_heads: int, window: int | None) -> str:
    return f"{str(dtype).removeprefix('torch.')}, heads {HEADS}/{key_heads} of {size}, window {window}"
