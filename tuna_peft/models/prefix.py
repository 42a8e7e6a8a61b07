"""The attention mask of shared-prefix rows.

Shape suffixes: B rows, T tokens of a row, S segments of a row; q queries, k keys.
"""

from __future__ import annotations

from typing import Any

import torch

from tuna_peft.errors import UserError


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


def attention_masks(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The mask in the form the model takes: a tensor, or one by layer type where its layers differ.

    Raises:
        UserError: The model has layers that take no such mask (linear attention, state space), or runs an attention
            kernel without masks (flash attention).
    """
    config = model.config.get_text_config()
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            f"attention {kernel!r} takes no mask of its own", fix="Load the model with attn_implementation='sdpa'."
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(sorted(unknown))}, which cannot share a prompt's rows",
            fix="Use a model with plain attention layers.",
        )
    layout = batch["segment_ids"], batch["position_ids"], batch["limits"]
    masks = {}
    for kind in kinds:
        mask = shared_prefix_mask(*layout, window if kind == "sliding_attention" else None)
        if kernel == "eager":  # adds its mask to the scores
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        masks[kind] = mask
    return masks if len(masks) > 1 else next(iter(masks.values()))
