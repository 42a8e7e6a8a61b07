"""The attention mask of shared-prefix rows.

Shape suffixes: B rows, T tokens of a row, S segments of a row; q queries, k keys.
"""

from __future__ import annotations

from typing import Any

import torch

from tuna_peft.errors import UserError
from tuna_peft.limits import LONG_ROW
from tuna_peft.models.forward.segments import NAME as SEGMENTS
from tuna_peft.models.forward.segments import Segments, has_one_kernel, layer_windows, placeholder_mask, use_segments


def shared_prefix_mask(
    segment_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, limits_BSS: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """`(B, 1, T, T)` booleans, True where query q may look at key k: at itself and what its sequence has before it.

    Args:
        segment_ids_BT: See `RankedCollator`, as for the others. Padding sees itself alone: a query without any key
            would turn into NaN.
        position_ids_BT: Positions in the sequence of each token.
        limits_BSS: Up to which position a segment sees another.
        window: Keys further back than this are hidden (sliding-window models lose their own window when they are
            given a mask, so it is built in here).
    """
    rows = torch.arange(len(segment_ids_BT), device=segment_ids_BT.device)[:, None, None]
    q, k = position_ids_BT[:, :, None], position_ids_BT[:, None, :]
    mask_BTT = k < limits_BSS[rows, segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]]
    mask_BTT &= k <= q
    if window is not None:
        mask_BTT &= q - k < window
    mask_BTT |= torch.eye(mask_BTT.shape[1], dtype=torch.bool, device=mask_BTT.device)
    return mask_BTT[:, None]


def model_inputs(model: Any, batch: dict[str, torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor]:
    """What the model is called with: `input_ids` and `position_ids`, and what tells its attention who sees whom.

    Short rows go as they are with an `attention_mask`, a tensor or one by layer type where layers differ. Long ones go
    without their padding, behind each other in a single row, with `segments` in place of a mask.

    Returns:
        These inputs, and the indices `(R,)` of the batch's predictors in the flattened tokens of the model's output.

    Raises:
        UserError: The model has layers that take no such mask (linear attention, state space), or runs an attention
            kernel without masks (flash attention).
    """
    config = model.config.get_text_config()
    windows = layer_windows(config)
    use_segments(model)
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager", SEGMENTS):
        raise UserError(
            f"attention {kernel!r} takes no mask of its own", fix="Load the model with attn_implementation='sdpa'."
        )
    layout = batch["segment_ids"], batch["position_ids"], batch["limits"]
    by_segment = kernel == SEGMENTS and layout[0].shape[1] >= LONG_ROW
    masks = {}
    for kind, window in windows.items():
        if by_segment:
            masks[kind] = placeholder_mask(layout[0].device)
            continue
        mask = shared_prefix_mask(*layout, window)
        if kernel == "eager":  # adds its mask to the scores
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        masks[kind] = mask
    inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "position_ids")}
    predictors = batch["predictors"]
    if by_segment:
        inputs = {key: ids.flatten()[None, batch["tokens"]] for key, ids in inputs.items()}
        inputs["segments"] = Segments.of(batch)
    else:
        predictors = batch["tokens"][predictors]
    inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    return inputs, predictors


def describe_attention(model: Any, device: torch.device) -> str:
    """How this model attends to shared rows here, and why, for the log."""
    if model.config.get_text_config()._attn_implementation != SEGMENTS:
        return "attention: a dense mask, as the model was loaded with eager attention"
    kernel = (
        "FlashAttention's variable-length kernel"
        if has_one_kernel(device)
        else "a kernel call for each segment (FlashAttention needs 16 bits, Ampere or later, PyTorch 2.11, and Linux)"
    )
    return f"attention: rows of {LONG_ROW} tokens and more by segment, through {kernel}; shorter ones by a dense mask"
