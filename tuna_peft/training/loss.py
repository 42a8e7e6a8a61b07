"""The Tuna ranking loss (Li et al. 2023, https://arxiv.org/abs/2310.13385, section 3), and two others for ranked
responses.

`TunaTrainer.compute_loss` calls `RankingLoss`; `tuna_loss` is the function for other code.

Shape suffixes: B prompts, N responses of a prompt, G = N - 1 differences in rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn.functional import softplus

Reduction = Literal["gap_mean", "pair_sum"]
LossType = Literal["hinge", "logistic", "list_mle"]


@dataclass(frozen=True)
class RankingLoss:
    r"""A loss over a prompt's ranked responses, with length-normalized log-probabilities \(v\) and ranks \(r\).

    - `hinge`, Tuna's: \(\max(0,\; v_j - v_i + m\,(r_j - r_i))\) for every response \(i\) better than \(j\).
    - `logistic`: \(\log(1 + \exp(\beta\,(v_j - v_i + m\,(r_j - r_i))))\), SimPO's loss
      (https://arxiv.org/abs/2405.14734, with \(\gamma = \beta m\) per step) over all pairs of a prompt's responses.
    - `list_mle`: \(\sum_i \log(1 + \sum_{j:\,r_j > r_i} \exp(\beta\,(v_j - v_i)))\), minus the log-likelihood of the
      order under Plackett and Luce's model (ListMLE, Xia et al. 2008), averaged over prompts. It has no pairs, so
      `margin` and `reduction` have no effect. Tied responses do not appear in each other's sum.

    Attributes:
        loss_type: `hinge`, `logistic` or `list_mle`.
        margin: \(m\) per step in rank.
        reduction: `gap_mean`, as in the released code: the mean over all pairs of a batch that are g steps apart,
            summed over g. `pair_sum`, the paper's formula: the sum over a prompt's pairs, averaged over prompts.
        beta: Inverse temperature of `logistic` and `list_mle`.
    """

    loss_type: LossType = "hinge"
    margin: float = 0.1
    reduction: Reduction = "gap_mean"
    beta: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in (("loss_type", LossType), ("reduction", Reduction)):
            if getattr(self, name) not in get_args(choices):
                known = " or ".join(repr(choice) for choice in get_args(choices))
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use {known}")

    def __call__(self, scores_BN: torch.Tensor, ranks_BN: torch.Tensor, counts: PairCounts) -> torch.Tensor:
        """The part of the loss that this batch contributes, averaged over `counts`.

        Args:
            scores_BN: `(batch, n)` length-normalized log-probabilities.
            ranks_BN: `(batch, n)` dense ranks, see `dense_ranks`; -1 where a response is missing.
            counts: Pairs and prompts of this batch, or of the whole optimizer step that it belongs to; `pairs_G` has
                at least n - 1 entries.

        Returns:
            A scalar. With the counts of the step, the results of its micro-batches add up to the loss of the step.
        """
        sums_G = self.sums(scores_BN, ranks_BN)
        denominators_G = self.denominators(counts)[: len(sums_G)]
        return sums_G @ denominators_G.clamp_min(1).double().reciprocal().to(sums_G)

    def sums(self, scores_BN: torch.Tensor, ranks_BN: torch.Tensor) -> torch.Tensor:
        """The losses of a batch, not averaged yet, so that those of different batches add up.

        Returns:
            `(G,)` by difference in rank for `gap_mean`; `(1,)` for what is averaged over prompts.
        """
        # Missing responses may have any score, even NaN, which must not reach the sum or the gradient.
        scores_BN = scores_BN.masked_fill(ranks_BN < 0, 0.0)
        steps_BNN = distances(ranks_BN)
        ahead_BNN = scores_BN[:, None, :] - scores_BN[:, :, None]  # [b, i, j]: how far j, ranked below i, is ahead
        if self.loss_type == "list_mle":
            # Only responses that are ranked below i compete with it.
            below_BNN = (self.beta * ahead_BNN).masked_fill(steps_BNN == 0, -torch.inf)
            zeros_BN1 = torch.zeros_like(scores_BN)[..., None]  # log(1 + sum exp(x)) = logsumexp(0, x)
            return torch.cat([zeros_BN1, below_BNN], dim=-1).logsumexp(-1).sum()[None]
        violations_BNN = ahead_BNN + self.margin * steps_BNN.to(scores_BN)
        losses_BNN = violations_BNN.clamp_min(0) if self.loss_type == "hinge" else softplus(self.beta * violations_BNN)
        # Sums by difference in rank, because `gap_mean` averages each of them over its own number of pairs.
        gaps = range(1, scores_BN.shape[1])
        if not gaps:
            return scores_BN.sum()[None] * 0  # zero, with a gradient: `backward` must work for a batch without pairs
        sums_G = torch.stack([losses_BNN.masked_fill(steps_BNN != gap, 0.0).sum() for gap in gaps])
        return sums_G if self.reduction == "gap_mean" else sums_G.sum()[None]

    def denominators(self, counts: PairCounts) -> torch.Tensor:
        """The numbers of pairs, or of prompts, that the `sums` are averaged over; `(G,)` or `(1,)`."""
        by_gap = self.reduction == "gap_mean" and self.loss_type != "list_mle"
        return counts.pairs_G if by_gap else counts.prompts[None]


def tuna_loss(
    scores: torch.Tensor,
    *,
    ranks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    margin: float = 0.1,
    reduction: Reduction = "gap_mean",
    loss_type: LossType = "hinge",
    beta: float = 2.0,
) -> torch.Tensor:
    """The ranking loss of one batch, see `RankingLoss` for the formulas.

    Args:
        scores: `(batch, n)` length-normalized log-probabilities, best response first.
        ranks: `(batch, n)` integers, lower is better, equal where tied; only their order matters. Tied responses form
            no pair and count as one rank. By default the position among the responses that are not missing.
        mask: `(batch, n)` booleans, False where a response is missing (prompts may have fewer than n).
        margin, reduction, loss_type, beta: See `RankingLoss`.

    Returns:
        A scalar; 0 where no pair exists.

    Raises:
        ValueError: Shapes differ, or the reduction or the type is unknown.
    """
    loss = RankingLoss(loss_type, margin, reduction, beta)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if ranks is None:
        ranks = mask.long().cumsum(-1)
    if scores.dim() != 2 or ranks.shape != scores.shape or mask.shape != scores.shape:
        raise ValueError(
            f"scores, ranks and mask must share the shape (batch, n); got {tuple(scores.shape)}, "
            f"{tuple(ranks.shape)}, {tuple(mask.shape)}"
        )
    ranks = dense_ranks(ranks, mask)
    return loss(scores, ranks, PairCounts.of(ranks))


def dense_ranks(ranks_BN: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
    """Ranks 0, 1, 2... in the order of `ranks_BN`, equal where tied; -1 where the mask is False."""
    better_BNN = (ranks_BN[:, None, :] < ranks_BN[:, :, None]) & mask_BN[:, None, :]
    # Count distinct better ranks: of equal ones only the first counts.
    equal_BNN = (ranks_BN[:, None, :] == ranks_BN[:, :, None]) & mask_BN[:, None, :] & mask_BN[:, :, None]
    first_BN = ~equal_BNN.tril(-1).any(-1) & mask_BN
    dense_BN = (better_BNN & first_BN[:, None, :]).sum(-1)
    return dense_BN.masked_fill(~mask_BN, -1)


def distances(ranks_BN: torch.Tensor) -> torch.Tensor:
    """`(B, N, N)`: ranks of j minus i, and 0 where the two form no pair (tied, j better, or one is missing)."""
    present_BNN = (ranks_BN[:, :, None] >= 0) & (ranks_BN[:, None, :] >= 0)
    return (ranks_BN[:, None, :] - ranks_BN[:, :, None]).clamp_min(0).masked_fill(~present_BNN, 0)


@dataclass
class PairCounts:
    """The numbers of pairs and prompts that a loss is averaged over, in one micro-batch or in an optimizer step.

    Attributes:
        pairs_G: `(G,)` number of pairs by difference in rank, starting with 1.
        prompts: Scalar, number of prompts.
    """

    pairs_G: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def of(cls, ranks_BN: torch.Tensor) -> PairCounts:
        """Counts the pairs of dense ranks, see `dense_ranks`."""
        steps = max(ranks_BN.shape[1] - 1, 1)
        pairs = torch.bincount(distances(ranks_BN).flatten(), minlength=steps + 1)[1 : steps + 1]
        return cls(pairs, torch.tensor(len(ranks_BN), device=ranks_BN.device))
