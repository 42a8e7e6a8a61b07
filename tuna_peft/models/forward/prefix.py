"""From a `PackedBatch` to the inputs of the model: its tokens, and which of them attend to which.

`tuna_peft.models.forward.scoring` calls it before every forward pass. Short sequences get a dense mask, long ones are
computed segment by segment (`tuna_peft.models.forward.segments`).

Shape suffixes: see `tuna_peft.data.batch`; q queries, k keys.
"""

from __future__ import annotations

from typing import Any

import torch

from tuna_peft.data.batch import PackedBatch
from tuna_peft.errors import UserError
from tuna_peft.limits import LONG_ROW
from tuna_peft.models.forward.segments import NAME as SEGMENTS
from tuna_peft.models.forward.segments import (
    Segments,
    has_varlen_attention,
    layer_windows,
    placeholder_mask,
    use_segments,
)


def shared_prefix_mask(
    segment_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, limits_BSS: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """`(B, 1, T, T)` booleans, True where query q attends to key k: itself and the earlier tokens of its response.

    Args:
        segment_ids_BT: See `PackedBatch`, like the next two. Padding attends to itself only: a query without any key
            would give NaN.
        position_ids_BT: Position of each token in its response's sequence.
        limits_BSS: The position below which a segment sees another.
        window: Size of the sliding window, or None. Models with one drop it when they are given a mask, so the mask
            has to include it.
    """
    rows = torch.arange(len(segment_ids_BT), device=segment_ids_BT.device)[:, None, None]
    q, k = position_ids_BT[:, :, None], position_ids_BT[:, None, :]
    mask_BTT = k < limits_BSS[rows, segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]]
    mask_BTT &= k <= q
    if window is not None:
        mask_BTT &= q - k < window
    mask_BTT |= torch.eye(mask_BTT.shape[1], dtype=torch.bool, device=mask_BTT.device)
    return mask_BTT[:, None]


def model_inputs(model: Any, batch: PackedBatch) -> tuple[dict[str, Any], torch.Tensor]:
    """The keyword arguments for a forward pass of `model` over `batch`.

    Short sequences keep their shape `(B, T)` and get an `attention_mask`: a tensor, or a dict by layer type where
    layers differ. Long ones are concatenated without padding to `(1, U)`, with `segments` instead of a mask.

    Returns:
        `input_ids`, `position_ids` and these; and `(R,)`, the batch's predictors as indices among the flattened tokens
        of the model's output.

    Raises:
        UserError: The model has layers that take no such mask (linear attention, state space), or its attention kernel
            takes none (flash attention).
    """
    config = model.config.get_text_config()
    windows = layer_windows(config)
    use_segments(model)
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager", SEGMENTS):
        raise UserError(
            f"attention {kernel!r} does not support custom masks",
            fix="Load the model with attn_implementation='sdpa'.",
        )
    layout = batch.segment_ids_BT, batch.position_ids_BT, batch.limits_BSS
    by_segment = kernel == SEGMENTS and layout[0].shape[1] >= LONG_ROW
    masks = {
        kind: placeholder_mask(layout[0].device) if by_segment else shared_prefix_mask(*layout, window)
        for kind, window in windows.items()
    }
    if kernel == "eager":  # eager attention adds its mask to the scores
        lowest = torch.finfo(model.dtype).min
        masks = {kind: torch.where(mask, 0.0, lowest).to(model.dtype) for kind, mask in masks.items()}
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT}
    predictors_R = batch.predictors_R  # among the tokens without padding
    if by_segment:
        inputs = {key: ids_BT.flatten()[None, batch.tokens_U] for key, ids_BT in inputs.items()}
        longest = batch.input_ids_BT.shape[1]
        inputs["segments"] = Segments(batch.q_offsets, batch.k_offsets, batch.keys_K, longest)
    else:
        predictors_R = batch.tokens_U[predictors_R]
    inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    return inputs, predictors_R


def describe_attention(model: Any, device: torch.device) -> str:
    """One sentence for the log: how this model computes attention on this device, and why."""
    if model.config.get_text_config()._attn_implementation != SEGMENTS:
        return "attention: a dense mask, because the model was loaded with eager attention"
    kernel = (
        "FlashAttention's variable-length kernel"
        if has_varlen_attention(device)
        else "one kernel call per segment (FlashAttention needs 16 bits, Ampere or later, PyTorch 2.11, and Linux)"
    )
    return f"attention: by segment from {LONG_ROW} tokens on, with {kernel}; a dense mask for shorter sequences"
