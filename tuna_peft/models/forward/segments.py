"""Attention of shared rows segment by segment: what the mask hides is never computed.

A segment (an unbranched run of a row's tree, see `tuna_peft.data.collate`) attends to its ancestors' tokens and,
causally, to its own: the keys are gathered once per layer, and each segment is a causal attention aligned at its end.
FlashAttention's variable-length kernel takes all of them in one call (16-bit, from Ampere and PyTorch 2.11 on);
elsewhere each is a call of `scaled_dot_product_attention`. A dense mask costs the square of a row, this the pairs that
see each other; and as each segment knows its keys, all rows of a batch stand behind each other without padding.

Shape suffixes: U tokens of the batch without padding, S segments, K gathered keys, H heads, D head size.
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
        keys: `(K,)` the keys' places among the tokens: ancestors from the root down, then the segment.
        longest: No segment has more keys than this.
    """

    q_offsets: torch.Tensor
    k_offsets: torch.Tensor
    keys: torch.Tensor
    longest: int
    _masks: dict[tuple[int, int, int | None], torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Segments:
        """Those of a batch of `RankedCollator`."""
        return cls(batch["q_offsets"], batch["k_offsets"], batch["keys"], longest=batch["input_ids"].shape[1])

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each segment; read once for all layers, as it makes a GPU wait."""
        return self.q_offsets.diff().tolist(), self.k_offsets.diff().tolist()

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """The causal mask aligned at the end; None where plain causality says the same."""
        if queries == keys and (window is None or keys <= window):
            return None
        shape = queries, keys, window
        if shape not in self._masks:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            mask = mask if window is None else mask.triu(keys - queries - window + 1)
            self._masks[shape] = mask[None, None]
        return self._masks[shape]


def use_segments(model: Any) -> None:
    """Makes a model that runs on SDPA take `segments=` too; all other calls of it stay plain SDPA."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def placeholder_mask(device: torch.device) -> torch.Tensor:
    """Stands for the mask that `segments` makes needless: without one, transformers reads restarted positions as
    packed sequences and hides the prompt."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def layer_windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each type of attention layer that the model has, None for full attention.

    Raises:
        UserError: It has layers of another type (linear attention, state space).
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(sorted(unknown))}, which cannot share a prompt's rows",
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
        `(1, U, H, D)`, and no weights.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise UserError(
                f"{module.config.model_type} does not hand keyword arguments to its attention layers",
                fix="Load the model with attn_implementation='eager'.",
            )
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    keys, values = keys[segments.keys], values[segments.keys]
    kinds = getattr(module.config, "layer_types", None)
    windows = layer_windows(module.config)
    window = windows[kinds[module.layer_idx]] if kinds else next(iter(windows.values()))
    attend = _in_one_kernel if _takes_flash(query, dropout) else _one_by_one
    return attend(module, queries, keys, values, segments, window, dropout, scaling)[None], None


def has_flash(device: torch.device) -> bool:
    """Whether PyTorch's FlashAttention is there: a GPU from Ampere on, and not Windows, whose wheels lack it."""
    return (
        device.type == "cuda"
        and is_ampere_or_later(torch.cuda.get_device_capability(device))
        and torch.backends.cuda.is_flash_attention_available()
    )


def has_one_kernel(device: torch.device) -> bool:
    """Whether FlashAttention takes segments of all lengths at once: with PyTorch 2.11."""
    return has_flash(device) and {"scale", "window_size"} <= kernel_options()


@cache
def kernel_options() -> frozenset[str]:
    """What the installed PyTorch's `varlen_attn` can be told; nothing where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _suits_flash(query: torch.Tensor) -> bool:
    """Whether FlashAttention is there for these states: 16-bit, heads of at most 256."""
    return query.dtype in (torch.float16, torch.bfloat16) and has_flash(query.device) and query.shape[-1] <= 256


def _takes_flash(query: torch.Tensor, dropout: float) -> bool:
    """Whether its variable-length kernel serves them: heads of a multiple of 8, no dropout."""
    return _suits_flash(query) and has_one_kernel(query.device) and query.shape[-1] % 8 == 0 and not dropout


def _sdpa(module, query, key, value, mask, *settings, **kwargs):
    """transformers' SDPA, with the causal mask as a tensor where heads share keys on a GPU without FlashAttention.

    Without a mask transformers leaves the sharing to SDPA. Only FlashAttention can do that: elsewhere (a T4, Windows,
    fp32) SDPA takes its slowest kernel, which holds all scores in fp32 (transformers issue 48633). With a mask,
    transformers lays the heads out for the memory-efficient kernel.
    """
    if mask is None and query.shape[1] > key.shape[1] and query.is_cuda and not _suits_flash(query):
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, *settings, **kwargs)


def _in_one_kernel(module, query, key, value, segments: Segments, window, dropout, scaling) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in kernel_options():
            grouped["enable_gqa"] = True
        else:  # PyTorch 2.11
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return varlen_attn(
        query, key, value, segments.q_offsets, segments.k_offsets, segments.longest, segments.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )  # fmt: skip


def _one_by_one(module, query, key, value, segments: Segments, window, dropout, scaling) -> torch.Tensor:
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
