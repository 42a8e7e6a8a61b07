"""The ranking step as `TunaTrainer` computes it, and variants without one of its optimizations.

Shape suffixes: see `tuna_peft.data.batch`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.workloads import Group
from tuna_peft.data.batch import PackedBatch
from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward import prefix
from tuna_peft.models.forward.prefix import model_inputs
from tuna_peft.models.forward.scoring import ResponseLogps, response_logps
from tuna_peft.training.loss import tuna_loss


def batch_of(groups: list[Group], *, share_responses: bool = True) -> PackedBatch:
    """One packed sequence for each group."""
    return RankedCollator(pad_token_id=0, share_responses=share_responses)(groups)


def separate_rows(groups: list[Group]) -> PackedBatch:
    """One row for each candidate, prompt and response."""
    rows = [
        {**group, "completions_ids": [response], "completion_skips": [0], "ranks": [0]}
        for group in groups
        for response in group["completions_ids"]
    ]
    return RankedCollator(pad_token_id=0)(rows)


def to_meta(batch: PackedBatch) -> PackedBatch:
    """The batch on the `meta` device; segment offsets keep their values, as they decide how many kernel calls run."""
    return replace(batch.to("meta"), q_offsets=batch.q_offsets, k_offsets=batch.k_offsets)


def loss_of(model: Any, batch: PackedBatch, responses: int) -> torch.Tensor:
    """Ranking loss plus SFT loss (NLL)."""
    return _loss(response_logps(model, batch), responses)


def loss_with_dense_mask(model: Any, batch: PackedBatch, responses: int) -> torch.Tensor:
    """Attention over all pairs of tokens of a sequence, most of them masked."""
    with mock.patch.object(prefix, "LONG_ROW", math.inf):
        return loss_of(model, batch, responses)


def loss_with_full_logits(model: Any, batch: PackedBatch, responses: int) -> torch.Tensor:
    """Packed sequences, but logits and their log-softmax at every position."""
    inputs, predictors_R = model_inputs(model, batch)
    logits = model(**inputs, use_cache=False).logits
    logps = torch.nn.functional.log_softmax(logits.float(), dim=-1).flatten(0, 1)
    logps_R = logps[predictors_R, batch.targets_R]
    shape = batch.ranks_BN.shape
    sums = logps_R.new_zeros(shape.numel()).index_add(0, batch.responses_P, logps_R[batch.predictions_P])
    lengths = torch.bincount(batch.responses_P, minlength=shape.numel())
    return _loss(ResponseLogps(sums.view(shape), lengths.view(shape)), responses)


def _loss(logps: ResponseLogps, responses: int) -> torch.Tensor:
    scores_BN = logps.normalised().view(-1, responses)
    ranks_BN = torch.arange(responses, device=scores_BN.device).expand(scores_BN.shape)
    return tuna_loss(scores_BN, ranks=ranks_BN) - logps.sums_BN.sum() / logps.lengths_BN.sum()
