"""From a packed batch to the log-probability of every response, for training and evaluation alike.

Shape suffixes: B prompts, N responses, T tokens of a row, R predicted tokens (each once).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from tuna_peft.models.logps import require_plain_head, token_logps
from tuna_peft.models.prefix import model_inputs


@dataclass
class ResponseLogps:
    """What the loss and the metrics need of a batch.

    Attributes:
        sums_BN: Summed log-probability of each response, nats; 0 where there is none.
        lengths_BN: Tokens that carry loss, EOS included; 0 where there is none.
    """

    sums_BN: torch.Tensor
    lengths_BN: torch.Tensor

    def normalised(self, length_penalty: float = 1.0) -> torch.Tensor:
        """`(B, N)` scores v = sum / length**beta (equation 2 of the paper)."""
        return self.sums_BN / self.lengths_BN.clamp_min(1) ** length_penalty


def response_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> ResponseLogps:
    """Runs a batch of `RankedCollator` through `model` once.

    Args:
        model: A causal LM, a `PeftModel` around one, or either wrapped for distributed training.
        batch: See `RankedCollator`, on the model's device.
    """
    inputs, predictors = model_inputs(unwrap(model), batch)
    hidden_BTD = final_hidden_states(model, **inputs)
    head = require_plain_head(unwrap(model))
    logps_R = token_logps(hidden_BTD.flatten(0, 1)[predictors], head, batch["targets"])
    shape = batch["ranks"].shape
    sums = logps_R.new_zeros(shape.numel()).index_add(0, batch["candidates"], logps_R[batch["path"]])
    # `bincount` would make a GPU wait, to learn how many there are.
    lengths = (
        batch["ranks"].new_zeros(shape.numel()).index_add(0, batch["candidates"], torch.ones_like(batch["candidates"]))
    )
    return ResponseLogps(sums.view(shape), lengths.view(shape))


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside what distributed training puts around it."""
    return getattr(model, "module", model)


def final_hidden_states(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    """`(B, T, hidden)` after the last norm.

    The whole model is called, so that what wraps it (autocast, DDP) does its work, and asked for one position of
    logits; a hook takes the states on the way. Through `output_hidden_states` they would come out as fp32 copies of
    every layer under mixed precision.
    """
    causal_lm = unwrap(model)
    if isinstance(causal_lm, PeftModel):
        causal_lm = causal_lm.get_base_model()
    taken: list[torch.Tensor] = []
    hook = causal_lm.base_model.register_forward_hook(lambda module, args, output: taken.append(output[0]))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return taken[0]
