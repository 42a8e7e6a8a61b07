"""Proof, on the model at hand, that a shared row gives the log-probabilities of separate rows."""

from __future__ import annotations

from typing import Any

import torch

from tuna_peft.data.collate import RankedCollator
from tuna_peft.errors import UserError
from tuna_peft.models.logps import require_plain_head, token_logps
from tuna_peft.models.scoring import final_hidden_states, response_logps, unwrap

# Of a mean log-probability per token, in nats. 16-bit matrix products of other shapes round differently, and 8-bit
# layers round their activations.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02, torch.int8: 0.05}


@torch.no_grad()
def verify_shared_rows(model: torch.nn.Module, row: dict[str, Any], device: torch.device) -> float:
    """Scores one encoded row packed and with each response in a plain row of its own.

    Returns:
        The largest difference of a response's mean log-probability, in nats.

    Raises:
        UserError: It is more than rounding: this model or its attention kernel does not honour the mask.
    """
    training = model.training
    model.eval()  # dropout would draw differently
    try:
        batch = {key: value.to(device) for key, value in RankedCollator(0)([row]).items()}
        packed = response_logps(model, batch).normalised()[0]
        separate = torch.stack([
            _separate(model, row["prompt_ids"], response, skip, device)
            for response, skip in zip(row["completions_ids"], row["completion_skips"], strict=True)
        ])  # fmt: skip
    finally:
        model.train(training)
    difference = (packed - separate).abs().max().item()
    tolerance = _tolerance(model, device)
    if not difference <= tolerance:  # NaN too
        raise UserError(
            f"{unwrap(model).config.model_type}: rows that share a prompt give other log-probabilities than separate "
            f"rows (by {difference:.3g} nats a token, {tolerance:.3g} is rounding)",
            fix="Load the model with attn_implementation='eager' or 'sdpa', or report the model type.",
        )
    return difference


def _tolerance(model: torch.nn.Module, device: torch.device) -> float:
    dtypes = {require_plain_head(unwrap(model)).weight.dtype}
    if getattr(unwrap(model), "is_loaded_in_8bit", False):
        dtypes.add(torch.int8)
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(_TOLERANCE[dtype] for dtype in dtypes)


def _separate(model: torch.nn.Module, prompt: list[int], response: list[int], skip: int, device) -> torch.Tensor:
    ids = torch.tensor([prompt + response], device=device)
    hidden_TD = final_hidden_states(model, input_ids=ids)[0]
    first = len(prompt) + skip
    return token_logps(hidden_TD[first - 1 : -1], require_plain_head(unwrap(model)), ids[0, first:]).mean()
