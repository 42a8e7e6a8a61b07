"""Losses over all pairs of a prompt's responses, and the weights that a pair can get.

Shape suffixes: B prompts, N responses. In `(B, N, N)` the entry [b, i, j] belongs to response i and a worse one, j.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import softplus


def hinge(violations_BNN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""Tuna: \(\max(0, x)\), where \(x = v_j - v_i + margin\)."""
    return violations_BNN.clamp_min(0)


def logistic(violations_BNN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""SimPO and, on log-ratios without a margin, DPO: \(\log(1 + \exp(\beta x))\)."""
    return softplus(beta * violations_BNN)


def lambda_weights(v_BN: torch.Tensor, present_BN: torch.Tensor, grades_BN: torch.Tensor) -> torch.Tensor:
    r"""The weights of LambdaLoss, as in LiPO (https://arxiv.org/abs/2402.01878, equation 11).

    \(\Delta_{ij} = |2^{s_i} - 2^{s_j}| \cdot |1 / \log(1 + \tau_i) - 1 / \log(1 + \tau_j)|\), where s is the score and
    \(\tau\) the place by v, 1 for the highest: how much exchanging the two would change the DCG of the model's order.

    Returns:
        `(B, N, N)`, without gradients.
    """
    order_BN = v_BN.detach().masked_fill(~present_BN, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places_BN = order_BN.argsort(-1) + 1
    discounts_BN = 1 / torch.log1p(places_BN.to(v_BN))
    gains_BN = torch.exp2(grades_BN)
    return (
        (gains_BN[:, :, None] - gains_BN[:, None, :]) * (discounts_BN[:, :, None] - discounts_BN[:, None, :])
    ).abs()


PAIR_LOSSES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {"hinge": hinge, "logistic": logistic}
