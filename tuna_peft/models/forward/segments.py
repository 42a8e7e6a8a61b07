"""Attention over packed sequences segment by segment: query-key pairs that the mask hides are never computed.

A segment (an unbranched run of tokens, see `tuna_peft.data.batch`) attends to its ancestors' tokens and, causally, to
its own: the keys are gathered once per layer, and each segment is a causal attention aligned at its end.
FlashAttention's variable-length kernel takes all segments in one call (16-bit, from Ampere and PyTorch 2.11 on);
elsewhere each segment is one call of `scaled_dot_product_attention`. A dense mask costs the square of a sequence's
length, this only the pairs that see each other. As each segment knows its keys, the sequences of a batch are
concatenated without padding.

`tuna_peft.models.forward.prefix` decides when it is used; transformers calls `segment_attention` in every layer.

Shape suffixes: U tokens of the batch without padding, S segments of the batch, K gathered keys, H heads, D head size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuna_peft.errors import UserError
from tuna_peft.limits import is_ampere_or_later

NAME = "tuna_segments"


@dataclass
class Segments:
    """Which tokens attend to which, as the model's attention layers receive it.

    Attributes:
        q_offsets: `(S+1,)` int32, where each segment starts among the tokens.
        k_offsets: `(S+1,)` int32, where its keys start among the gathered ones.
        keys_K: `(K,)` places of the keys among the tokens: ancestors from the root down, then the segment itself.
        longest: An upper bound of the keys of one segment.
    """

    q_offsets: torch.Tensor
    k_offsets: torch.Tensor
    keys_K: torch.Tensor
    longest: int
    _masks: dict[tuple[int, int, int | None], torch.Tensor | None] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Numbers of queries and of keys of each segment; cached for all layers, as reading them makes the CPU wait
        for the GPU."""
        return self.q_offsets.diff().tolist(), self.k_offsets.diff().tolist()

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """`(1, 1, queries, keys)` causal mask aligned at the end; None where SDPA's `is_causal` gives it too."""
        if queries == keys and (window is None or keys <= window):
            return None
        shape = queries, keys, window
        if shape not in self._masks:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            mask = mask if window is None else mask.triu(keys - queries - window + 1)
            self._masks[shape] = mask[None, None]
        return self._masks[shape]


def use_segments(model: Any) -> None:
    """Makes a model that runs on SDPA accept `segments=`; calls without it still run plain SDPA."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    if config._attn_implementation == NAME and not hasattr(model, "segment_window"):
        windows, kinds = layer_windows(config), getattr(config, "layer_types", None)
        for module in model.modules():
            # Stored: a compiled layer that looks its own number up would be compiled for each number.
            index = getattr(module, "layer_idx", None)
            kind = kinds[index] if kinds and index is not None else next(iter(windows))
            module.segment_window = windows[kind]


def placeholder_mask(device: torch.device) -> torch.Tensor:
    """A mask that is never read, for calls with `segments`.

    Without any mask, transformers takes positions that restart for the beginning of another sequence, and would hide
    the prompt from all responses but the first.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def layer_windows(config: Any) -> dict[str, int | None]:
    """`{layer type: size of its sliding window}` for the attention layers of a model; None for full attention.

    Raises:
        UserError: The model has layers of another type (linear attention, state space), or no attention layers.
    """
    if not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"{config.model_type} has no attention layers, which packed sequences need",
            fix="Use a model with plain attention layers.",
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(sorted(unknown))}, which cannot use packed sequences",
            fix="Use a model with plain attention layers.",
        )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def segment_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers (`AttentionInterface`); without `segments` it is SDPA.

    Args:
        query: `(1, H, U, D)`; `key` and `value` may have fewer heads. Without `segments`, as for SDPA.

    Returns:
        `(1, U, H, D)`, and None in place of attention weights.

    Raises:
        UserError: The model does not pass keyword arguments on to its attention layers.
    """
    if segments is None:
        # `placeholder_mask` without segments: they were lost on the way through the model.
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise UserError(
                f"{module.config.model_type} does not pass keyword arguments on to its attention layers",
                fix="Load the model with attn_implementation='eager'.",
            )
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    # `index_select`, not `[...]`: its backward pass adds up without sorting the indices first.
    keys, values = (states.index_select(0, segments.keys_K) for states in (keys, values))
    attend = _attend_in_one_call if _supports_varlen(query, dropout) else _attend_by_segment
    return attend(module, queries, keys, values, segments, module.segment_window, dropout, scaling)[None], None


@torch.compiler.assume_constant_result
def has_flash(device: torch.device) -> bool:
    """Whether PyTorch's FlashAttention is there: a GPU from Ampere on, and not Windows, whose wheels lack it."""
    return (
        device.type == "cuda"
        and is_ampere_or_later(torch.cuda.get_device_capability(device))
        and torch.backends.cuda.is_flash_attention_available()
    )


@torch.compiler.assume_constant_result
def has_varlen_attention(device: torch.device) -> bool:
    """Whether FlashAttention's variable-length kernel can be used: its scale and window came with PyTorch 2.11."""
    return has_flash(device) and {"scale", "window_size"} <= varlen_options()


@cache
def varlen_options() -> frozenset[str]:
    """Parameter names of the installed PyTorch's `varlen_attn`; empty before PyTorch 2.10, which lacks it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _supports_flash(query: torch.Tensor) -> bool:
    """Whether FlashAttention can be used for these states: 16-bit, heads of at most 256."""
    return query.dtype in (torch.float16, torch.bfloat16) and has_flash(query.device) and query.shape[-1] <= 256


def _supports_varlen(query: torch.Tensor, dropout: float) -> bool:
    """Whether its variable-length kernel can be used, too: heads of a multiple of 8, no dropout."""
    return _supports_flash(query) and has_varlen_attention(query.device) and query.shape[-1] % 8 == 0 and not dropout


def _sdpa(module, query, key, value, mask, *settings, **kwargs):
    """transformers' SDPA, with an explicit causal mask for grouped-query attention on a GPU without FlashAttention.

    Works around transformers issue 48633. Without a mask, transformers passes `enable_gqa=True` to SDPA. Among its
    kernels only FlashAttention supports that: elsewhere (a T4, Windows, fp32) SDPA falls back to its slowest kernel,
    which holds all scores in fp32. With a mask, transformers repeats the keys for the memory-efficient kernel.
    """
    if mask is None and query.shape[1] > key.shape[1] and query.is_cuda and not _supports_flash(query):
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, *settings, **kwargs)


def _attend_in_one_call(module, query, key, value, segments: Segments, window, dropout, scaling) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if query.shape[1] > key.shape[1] and _has_enable_gqa() else {}
    return varlen_attn(
        query, key, value, segments.q_offsets, segments.k_offsets, segments.longest, segments.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _has_enable_gqa() -> bool:
    """Whether grouped heads have to be announced. PyTorch 2.11 has no such option, and takes them as they are."""
    return "enable_gqa" in varlen_options()


@torch.compiler.disable  # its number of calls is that of the segments
def _attend_by_segment(module, query, key, value, segments: Segments, window, dropout, scaling) -> torch.Tensor:
    q_lengths, k_lengths = segments.lengths
    outputs = []
    # `split`, not slices: its backward pass is one concatenation instead of a full-size sum for each segment.
    for q, k, v in zip(query.split(q_lengths), key.split(k_lengths), value.split(k_lengths), strict=True):
        mask = segments.mask(len(q), len(k), window, q.device)
        states = (part.transpose(0, 1)[None] for part in (q, k, v))
        output, _ = _sdpa(module, *states, mask, dropout, scaling)
        outputs.append(output[0])
    return torch.cat(outputs)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
