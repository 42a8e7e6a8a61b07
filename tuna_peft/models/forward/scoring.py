"""From a packed batch to the log-probability of every response, for training and evaluation alike.

Shape suffixes: B prompts, N responses, T tokens of a row, R predicted tokens (each once).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from tuna_peft.data.collate import RankedCollator
from tuna_peft.errors import UserError
from tuna_peft.models.forward.logps import require_plain_head, token_logps
from tuna_peft.models.forward.prefix import model_inputs


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


@torch.no_grad()
def stream_logps(
    model: torch.nn.Module,
    collate: RankedCollator,
    rows: Mapping[Any, dict[str, Any]],
    batches: Iterable[Sequence[Any]],
) -> Iterator[tuple[Sequence[Any], ResponseLogps]]:
    """Scores rows batch by batch, without gradients; a batch that runs out of memory goes on as two halves.

    Args:
        model: As in `response_logps`.
        collate: Makes a batch of rows.
        rows: Encoded rows, by whatever names them.
        batches: Names of the rows of each batch, the longest rows first: what does not fit into memory fails at once.

    Yields:
        The names of some rows and what `response_logps` gives for them.

    Raises:
        UserError: One row alone does not fit into memory.
    """
    device = next(model.parameters()).device
    queue = deque(batches)
    while queue:
        names = queue.popleft()
        try:
            tensors = {key: value.to(device) for key, value in collate([rows[name] for name in names]).items()}
            logps = response_logps(model, tensors)
        except torch.OutOfMemoryError as error:
            if len(names) == 1:
                tokens = len(collate.pack(rows[names[0]]).tokens)
                raise UserError(
                    f"a prompt with its responses ({tokens} tokens) does not fit into memory",
                    fix="Quantise the model, or leave such prompts out.",
                ) from error
            half = len(names) // 2
            queue.extendleft([names[half:], names[:half]])
            continue
        yield names, logps


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
