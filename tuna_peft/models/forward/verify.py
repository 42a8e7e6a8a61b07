"""Checks on a real model that packed sequences and our output layer give the model's own log-probabilities.

Run once before training (`TunaTrainer`), before scoring with a teacher, and by `tuna-peft doctor`: a model that
ignores the mask or the positions, or changes its logits in a way of its own, would otherwise train on wrong numbers
without an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tuna_peft.data.collate import RankedCollator
from tuna_peft.errors import UserError
from tuna_peft.models.forward.logps import output_head, token_logps
from tuna_peft.models.forward.scoring import final_hidden_states, response_logps, unwrap

# Largest difference that counts as rounding, in nats, of a response's mean log-probability. The first number holds for
# any length; the second is for one token and is divided by sqrt(length), because rounding errors of different tokens
# average out. Products of other shapes round differently in 16 bits, and 8-bit layers round their activations.
_TOLERANCE = {
    torch.float32: (1e-3, 1e-3),
    torch.bfloat16: (0.05, 0.4),
    torch.float16: (0.02, 0.1),
    torch.int8: (0.05, 0.4),
}


@torch.no_grad()
def verify_packing(model: torch.nn.Module, row: dict[str, Any], device: torch.device) -> float:
    """Scores one encoded row as a packed sequence, and again with each response in a sequence of its own.

    Returns:
        The largest difference of a response's mean log-probability, in nats.

    Raises:
        UserError: It is larger than rounding: this model or its attention kernel ignores the mask. Or it is not
            finite: the model overflows. Or the model's own logits give other log-probabilities than `output_head`.
    """
    row = {name: value for name, value in row.items() if not name.endswith("_gaps")}  # the mask is the same without
    training = model.training
    model.eval()  # dropout would differ between the two
    try:
        packed = response_logps(model, RankedCollator(0)([row]).to(device))
        responses = zip(row["completions_ids"], row["completion_skips"], strict=True)
        separate_N2 = torch.stack([_mean_logp(model, row["prompt_ids"], *response, device) for response in responses])
    finally:
        model.train(training)
    name, dtypes = unwrap(model).config.model_type, _dtypes(model, device)
    separate, off = separate_N2.T.tolist()
    pairs = zip(packed.normalised()[0].tolist(), separate, strict=True)
    differences = [abs(one - other) for one, other in pairs]
    if not all(map(math.isfinite, differences)):
        fix = "Check the weights of the base."
        if torch.float16 in dtypes:
            fix = "Hold the base in float32 (`base.dtype: float32`), or use a GPU that has bf16 (Ampere or later)."
        raise UserError(f"{name}: log-probabilities are not finite in {_named(dtypes)}", fix=fix)
    any_length, one_token = max(_TOLERANCE[dtype] for dtype in dtypes)
    if max(off) > one_token:
        raise UserError(
            f"{name}: the model changes its logits in a way that is not supported (log-probabilities differ by "
            f"{max(off):.3g} nats; rounding in {_named(dtypes)} explains {one_token:.3g})",
            fix="A factor (`logit_scale`, `logits_scaling`) and a soft cap (`final_logit_softcapping`) are supported.",
        )
    for difference, length in zip(differences, packed.lengths_BN[0].tolist(), strict=True):
        tolerance = max(any_length, one_token / length**0.5)
        if difference > tolerance:
            raise UserError(
                f"{name}: packed sequences give other log-probabilities than separate ones (by {difference:.3g} nats "
                f"per token over {length} tokens; rounding in {_named(dtypes)} explains {tolerance:.3g})",
                fix="Load the model with attn_implementation='eager' or 'sdpa', or report the model type.",
            )
    return max(differences)


def _dtypes(model: torch.nn.Module, device: torch.device) -> set[torch.dtype]:
    """The dtypes in which the model rounds: of its weights, of 8-bit layers, of autocast."""
    dtypes = {output_head(unwrap(model)).weight_VD.dtype}
    if getattr(unwrap(model), "is_loaded_in_8bit", False):
        dtypes.add(torch.int8)
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return dtypes


def _named(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _mean_logp(
    model: torch.nn.Module, prompt: list[int], response: list[int], skip: int, device: torch.device
) -> torch.Tensor:
    """`(2,)` the mean log-probability of a response without its first `skip` tokens, in a plain causal sequence; and
    the largest difference to what the model's own logits give after it, among the most likely tokens there."""
    ids = torch.tensor([prompt + response], device=device)
    hidden_BTD, own_BV = final_hidden_states(model, input_ids=ids)
    hidden_TD, head, first = hidden_BTD[0], output_head(unwrap(model)), len(prompt) + skip
    own_logps, likely = own_BV[0].float().log_softmax(-1).topk(min(8, own_BV.shape[-1]))
    off = (token_logps(hidden_TD[-1:].expand(len(likely), -1), head, likely) - own_logps).abs().max()
    return torch.stack([token_logps(hidden_TD[first - 1 : -1], head, ids[0, first:]).mean(), off])
