"""The ranking step as `TunaTrainer` computes it, and the same with one trick taken away.

Shape suffixes: B prompts, N responses, T tokens of a row, R predicted tokens (each once).
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch

from benchmarks.workloads import Group
from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward import prefix
from tuna_peft.models.forward.prefix import model_inputs
from tuna_peft.models.forward.scoring import ResponseLogps, response_logps
from tuna_peft.training.loss import tuna_loss


def batch_of(groups: list[Group], *, share_responses: bool = True) -> dict[str, torch.Tensor]:
    """One row for each group."""
    return RankedCollator(pad_token_id=0, share_responses=share_responses)(groups)


def separate_rows(groups: list[Group]) -> dict[str, torch.Tensor]:
    """One row for each candidate, prompt and response."""
    rows = [
        {**group, "completions_ids": [response], "completion_skips": [0], "ranks": [0]}
        for group in groups
        for response in group["completions_ids"]
    ]
    return RankedCollator(pad_token_id=0)(rows)


def loss_of(model: Any, batch: dict[str, torch.Tensor], responses: int) -> torch.Tensor:
    """Rank loss plus likelihood loss."""
    return _loss(response_logps(model, batch), responses)


def loss_with_dense_mask(model: Any, batch: dict[str, torch.Tensor], responses: int) -> torch.Tensor:
    """Attention of all pairs of a row, most of them masked."""
    with mock.patch.object(prefix, "LONG_ROW", math.inf):
        return loss_of(model, batch, responses)


def loss_with_full_logits(model: Any, batch: dict[str, torch.Tensor], responses: int) -> torch.Tensor:
    """Shared rows, but logits and their log-softmax at every position."""
    inputs, predictors = model_inputs(model, batch)
    logits = model(**inputs, use_cache=False).logits
    logps = torch.nn.functional.log_softmax(logits.float(), dim=-1).flatten(0, 1)
    logps_R = logps[predictors, batch["targets"]]
    shape = batch["ranks"].shape
    sums = logps_R.new_zeros(shape.numel()).index_add(0, batch["candidates"], logps_R[batch["path"]])
    lengths = torch.bincount(batch["candidates"], minlength=shape.numel())
    return _loss(ResponseLogps(sums.view(shape), lengths.view(shape)), responses)


def _loss(logps: ResponseLogps, responses: int) -> torch.Tensor:
    scores_BN = logps.normalised().view(-1, responses)
    ranks_BN = torch.arange(responses, device=scores_BN.device).expand(scores_BN.shape)
    return tuna_loss(scores_BN, ranks=ranks_BN) - logps.sums_BN.sum() / logps.lengths_BN.sum()
