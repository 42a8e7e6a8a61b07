r"""Losses over a prompt's whole list of responses; they have no pairs, so no margin and no reduction.

Each takes \(v\) (length-normalized log-probabilities, or log-ratios to the stack below), dense ranks with -1 where a
response is missing, scores, and \(\beta\), and returns the loss of each prompt, `(B,)`. \(r_i = \beta v_i\) below.

Shape suffixes: B prompts, N responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from tuna_peft.training.ranks import distances

ListLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def list_mle(v_BN: torch.Tensor, ranks_BN: torch.Tensor, grades_BN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""\(\sum_i \log(1 + \sum_{j:\,j \text{ worse}} \exp(r_j - r_i))\), minus the log-likelihood of the order under
    Plackett and Luce's model (ListMLE, Xia et al. 2008). On log-ratios it is DPO under that model
    (https://arxiv.org/abs/2305.18290, appendix A.3). Tied responses do not appear in each other's sum."""
    ahead_BNN = beta * (v_BN[:, None, :] - v_BN[:, :, None])
    worse_BNN = ahead_BNN.masked_fill(distances(ranks_BN) == 0, -torch.inf)
    zeros_BN1 = torch.zeros_like(v_BN)[..., None]  # log(1 + sum exp(x)) = logsumexp(0, x)
    return torch.cat([zeros_BN1, worse_BNN], dim=-1).logsumexp(-1).sum(-1)


def mpo(v_BN: torch.Tensor, ranks_BN: torch.Tensor, grades_BN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""Better half against worse half: \(-\log(\sum_{better} e^{r_i} / \sum_{all} e^{r_i})\), where better means above
    the mean rank; 0 if all are tied. MPO; SWEPO (https://arxiv.org/abs/2412.04628) divides at the mean score instead,
    and adds weights by the distance from it."""
    present_BN = ranks_BN >= 0
    mean_B1 = _mean(ranks_BN.to(v_BN), present_BN)[:, None]
    better_BN = present_BN & (ranks_BN < mean_B1)
    better_BN |= present_BN & ~better_BN.any(-1, keepdim=True)
    return _logits(v_BN, present_BN, beta).logsumexp(-1) - _logits(v_BN, better_BN, beta).logsumexp(-1)


def info_nca(v_BN: torch.Tensor, ranks_BN: torch.Tensor, grades_BN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""\(-\sum_i \mathrm{softmax}(s)_i \log \mathrm{softmax}(r)_i\) with the scores \(s\)
    (https://arxiv.org/abs/2402.05369, InfoNCA)."""
    present_BN = ranks_BN >= 0
    logs_BN = _logits(v_BN, present_BN, beta).log_softmax(-1)
    return -(_targets(grades_BN, present_BN) * logs_BN.masked_fill(~present_BN, 0.0)).sum(-1)


def nca(v_BN: torch.Tensor, ranks_BN: torch.Tensor, grades_BN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""\(-\sum_i (\mathrm{softmax}(s)_i \log \sigma(r_i) + \frac{1}{N} \log \sigma(-r_i))\)
    (https://arxiv.org/abs/2402.05369, NCA): it looks at each log-ratio alone, which keeps good responses likely."""
    present_BN = ranks_BN >= 0
    share_B1 = 1 / present_BN.sum(-1, keepdim=True).clamp_min(1).to(v_BN)
    r_BN = beta * v_BN
    losses_BN = -(_targets(grades_BN, present_BN) * logsigmoid(r_BN) + share_B1 * logsigmoid(-r_BN))
    return losses_BN.masked_fill(~present_BN, 0.0).sum(-1)


def qrpo(v_BN: torch.Tensor, ranks_BN: torch.Tensor, grades_BN: torch.Tensor, beta: float) -> torch.Tensor:
    r"""The mean of \((q_i - \beta \log Z - r_i)^2\) with \(Z = \beta (e^{1 / \beta} - 1)\)
    (https://arxiv.org/abs/2507.08068).

    \(q_i\) is the share of responses of the stack below that are not better than i. It is estimated from the list, so
    the list should be samples of that stack; from other lists it is the quantile among those responses."""
    present_BN = ranks_BN >= 0
    not_better_BNN = (ranks_BN[:, None, :] >= ranks_BN[:, :, None]) & present_BN[:, None, :]
    quantiles_BN = not_better_BNN.sum(-1).to(v_BN) / present_BN.sum(-1, keepdim=True).clamp_min(1)
    beta_log_z = beta * math.log(beta) + 1 + beta * math.log1p(-math.exp(-1 / beta))  # e^(1 / beta) may overflow
    return _mean((quantiles_BN - beta_log_z - beta * v_BN).square(), present_BN)


def _logits(v_BN: torch.Tensor, present_BN: torch.Tensor, beta: float) -> torch.Tensor:
    """beta * v, and the lowest number elsewhere: -inf would give NaN where a prompt has no response."""
    return (beta * v_BN).masked_fill(~present_BN, torch.finfo(v_BN.dtype).min)


def _targets(grades_BN: torch.Tensor, present_BN: torch.Tensor) -> torch.Tensor:
    return _logits(grades_BN, present_BN, 1.0).softmax(-1)


def _mean(values_BN: torch.Tensor, present_BN: torch.Tensor) -> torch.Tensor:
    return values_BN.masked_fill(~present_BN, 0.0).sum(-1) / present_BN.sum(-1).clamp_min(1)


LIST_LOSSES: dict[str, ListLoss] = {
    "list_mle": list_mle,
    "mpo": mpo,
    "info_nca": info_nca,
    "nca": nca,
    "qrpo": qrpo,
}
