"""The Tuna ranking loss (Li et al. 2023, https://arxiv.org/abs/2310.13385, section 3).

Shape suffixes: B prompts, N responses of a prompt, G = N - 1 rank distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Reduction = Literal["gap_mean", "pair_sum"]


def tuna_loss(
    scores: torch.Tensor,
    *,
    ranks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    margin: float = 0.1,
    reduction: Reduction = "gap_mean",
) -> torch.Tensor:
    r"""The hinge over all pairs of a ranked list, with a margin that grows with their distance in rank.

    For responses \(i\) better than \(j\), with length-normalised log-probabilities \(v\) and ranks \(r\):

    .. math:: \ell_{ij} = \max(0,\; v_j - v_i + m\,(r_j - r_i))

    Args:
        scores: `(batch, n)` length-normalised log-probabilities, best response first.
        ranks: `(batch, n)` integers, lower is better, equal where tied; only their order counts. Tied responses form
            no pair and count as one step in rank. By default the position among the responses that are there.
        mask: `(batch, n)` booleans, False where a response is missing (prompts may have fewer than n).
        margin: \(m\) per step in rank.
        reduction: `gap_mean`, as in the released code: the mean over all pairs of a batch that are g steps apart,
            summed over g. `pair_sum`, the paper's formula: the sum over a prompt's pairs, averaged over prompts.

    Returns:
        A scalar; 0 where no pair exists.

    Raises:
        ValueError: Shapes differ, or the reduction is unknown.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if ranks is None:
        ranks = mask.long().cumsum(-1)
    if scores.dim() != 2 or ranks.shape != scores.shape or mask.shape != scores.shape:
        raise ValueError(
            f"scores, ranks and mask must share the shape (batch, n); got {tuple(scores.shape)}, "
            f"{tuple(ranks.shape)}, {tuple(mask.shape)}"
        )
    ranks = dense_ranks(ranks, mask)
    return hinge_by_distance(scores, ranks, margin) @ pair_weights(PairCounts.of(ranks), reduction).to(scores)


def dense_ranks(ranks_BN: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
    """Ranks 0, 1, 2... in the order of `ranks_BN`, equal where tied; -1 where the mask is False."""
    better_BNN = (ranks_BN[:, None, :] < ranks_BN[:, :, None]) & mask_BN[:, None, :]
    # Count distinct better ranks: of equal ones, only the first is counted.
    equal_BNN = (ranks_BN[:, None, :] == ranks_BN[:, :, None]) & mask_BN[:, None, :] & mask_BN[:, :, None]
    first_BN = ~equal_BNN.tril(-1).any(-1) & mask_BN
    dense_BN = (better_BNN & first_BN[:, None, :]).sum(-1)
    return dense_BN.masked_fill(~mask_BN, -1)


def distances(ranks_BN: torch.Tensor) -> torch.Tensor:
    """`(B, N, N)`: how many steps j is below i, 0 where they form no pair (tied, j better, or one is missing)."""
    there_BNN = (ranks_BN[:, :, None] >= 0) & (ranks_BN[:, None, :] >= 0)
    return (ranks_BN[:, None, :] - ranks_BN[:, :, None]).clamp_min(0).masked_fill(~there_BNN, 0)


def hinge_by_distance(scores_BN: torch.Tensor, ranks_BN: torch.Tensor, margin: float) -> torch.Tensor:
    """`(G,)`: the hinge summed over all pairs of the batch that are 1, 2, ... N-1 steps apart."""
    distance_BNN = distances(ranks_BN)
    # Missing responses may hold any value, even NaN: they must not reach the sum or the gradient.
    scores_BN = scores_BN.masked_fill(ranks_BN < 0, 0.0)
    hinge_BNN = (scores_BN[:, None, :] - scores_BN[:, :, None] + margin * distance_BNN.to(scores_BN)).clamp_min(0)
    steps = range(1, scores_BN.shape[1])
    if not steps:
        return scores_BN.sum(dim=(0, 1))[None] * 0
    return torch.stack([hinge_BNN.masked_fill(distance_BNN != g, 0.0).sum() for g in steps])


@dataclass
class PairCounts:
    """How many pairs and prompts a loss is averaged over: one micro-batch, or all those of an optimiser step.

    Attributes:
        pairs_G: `(G,)` pairs by distance in rank.
        prompts: Scalar, the number of prompts.
    """

    pairs_G: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def of(cls, ranks_BN: torch.Tensor) -> PairCounts:
        """Counts the pairs of dense ranks, see `dense_ranks`."""
        steps = max(ranks_BN.shape[1] - 1, 1)
        pairs = torch.bincount(distances(ranks_BN).flatten(), minlength=steps + 1)[1 : steps + 1]
        return cls(pairs, torch.tensor(len(ranks_BN), device=ranks_BN.device))


def pair_weights(counts: PairCounts, reduction: Reduction) -> torch.Tensor:
    """`(G,)`: what each summed hinge is multiplied with, see `tuna_loss`."""
    if reduction == "gap_mean":
        return counts.pairs_G.clamp_min(1).double().reciprocal()
    if reduction == "pair_sum":
        return counts.prompts.double().reciprocal().expand(len(counts.pairs_G))
    raise ValueError(f"unknown reduction {reduction!r}: use 'gap_mean' or 'pair_sum'")
