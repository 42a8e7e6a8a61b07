"""`margin: auto`: a margin from how far responses are apart before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward.scoring import stream_logps
from tuna_peft.training.loss import RankingLoss

_ROWS = 200  # the median of some hundred pairs moves by a few percent only


def initial_margin(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: RankedCollator,
    loss: RankingLoss,
    length_penalty: float,
) -> float:
    """The median of |v_i - v_j| over pairs, per step in rank (or per unit of score), on up to 200 rows.

    So about half of the pairs that are in the right order keep the margin at the start. xi-DPO
    (https://arxiv.org/abs/2605.10981) takes its margin from the same distribution, with another loss.

    Args:
        rows: Encoded rows.
        loss: Says what the margin is multiplied by.

    Returns:
        The margin, with two digits.
    """
    chosen = {index: rows[index] for index in range(0, len(rows), -(-len(rows) // _ROWS))}
    training = model.training
    model.eval()
    gaps = []
    for names, logps in stream_logps(model, collate, chosen, [[name] for name in chosen]):
        batch = collate([chosen[name] for name in names])
        v_BN = logps.normalised(length_penalty).cpu()
        units_BNN = loss.margin_units(batch.ranks_BN, batch.grades_BN / loss.score_scale)
        paired_BNN = (units_BNN > 0) & (batch.ranks_BN >= 0)[:, None, :] & (batch.ranks_BN >= 0)[:, :, None]
        gaps.append(((v_BN[:, :, None] - v_BN[:, None, :]).abs() / units_BNN)[paired_BNN])
    model.train(training)
    return float(f"{torch.cat(gaps).median():.2g}")
