"""Proof, on the model at hand, that a shared row gives the log-probabilities of separate rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from tuna_peft.data.collate import RankedCollator
from tuna_peft.errors import UserError
from tuna_peft.models.forward.logps import require_plain_head, token_logps
from tuna_peft.models.forward.scoring import final_hidden_states, response_logps, unwrap

# Of a mean log-probability, in nats: at least, and of a single token, which others average out. 16-bit matrix products
# of other shapes round differently, and 8-bit layers round their activations.
_TOLERANCE = {
    torch.float32: (1e-3, 1e-3),
    torch.bfloat16: (0.05, 0.4),
    torch.float16: (0.02, 0.1),
    torch.int8: (0.05, 0.4),
}


@torch.no_grad()
def verify_shared_rows(model: torch.nn.Module, row: dict[str, Any], device: torch.device) -> float:
    """Scores one encoded row packed and with each response in a plain row of its own.

    Returns:
        The largest difference of a response's mean log-probability, in nats.

    Raises:
        UserError: It is more than rounding: this model or its attention kernel does not honour the mask. Or it is no
            number: the model overflows.
    """
    training = model.training
    model.eval()  # dropout would draw differently
    try:
        batch = {key: value.to(device) for key, value in RankedCollator(0)([row]).items()}
        packed = response_logps(model, batch)
        separate = torch.stack([
            _separate(model, row["prompt_ids"], response, skip, device)
            for response, skip in zip(row["completions_ids"], row["completion_skips"], strict=True)
        ])  # fmt: skip
    finally:
        model.train(training)
    name, dtypes = unwrap(model).config.model_type, _dtypes(model, device)
    pairs = zip(packed.normalised()[0].tolist(), separate.tolist(), strict=True)
    differences = [abs(one - other) for one, other in pairs]
    if not all(map(math.isfinite, differences)):
        fix = "Check the weights of the base."
        if torch.float16 in dtypes:
            fix = "Hold the base in float32 (`base.dtype: float32`), or use a GPU that has bf16 (Ampere or later)."
        raise UserError(f"{name}: log-probabilities are not finite in {_named(dtypes)}", fix=fix)
    least, of_one = max(_TOLERANCE[dtype] for dtype in dtypes)
    for difference, length in zip(differences, packed.lengths_BN[0].tolist(), strict=True):
        tolerance = max(least, of_one / length**0.5)
        if difference > tolerance:
            raise UserError(
                f"{name}: rows that share a prompt give other log-probabilities than separate rows (by "
                f"{difference:.3g} nats a token over {length}; {tolerance:.3g} is rounding in {_named(dtypes)})",
                fix="Load the model with attn_implementation='eager' or 'sdpa', or report the model type.",
            )
    return max(differences)


def _dtypes(model: torch.nn.Module, device: torch.device) -> set[torch.dtype]:
    """What the model rounds to."""
    dtypes = {require_plain_head(unwrap(model)).weight.dtype}
    if getattr(unwrap(model), "is_loaded_in_8bit", False):
        dtypes.add(torch.int8)
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return dtypes


def _named(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _separate(model: torch.nn.Module, prompt: list[int], response: list[int], skip: int, device) -> torch.Tensor:
    ids = torch.tensor([prompt + response], device=device)
    hidden_TD = final_hidden_states(model, input_ids=ids)[0]
    first = len(prompt) + skip
    return token_logps(hidden_TD[first - 1 : -1], require_plain_head(unwrap(model)), ids[0, first:]).mean()
