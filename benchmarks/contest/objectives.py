"""Objectives over whole lists: ours in its variants, and those of other papers, on the same log-probabilities.

Shape suffixes: B prompts, N responses.
"""

from __future__ import annotations

from tuna_peft.training.loss import tuna_loss
from tuna_peft.training.ranks import distances


def ranking(**options):
    """`tuna_loss` with these options."""

    def loss(scores_BN, ranks_BN, grades_BN):
        return tuna_loss(scores_BN, ranks=ranks_BN, mask=ranks_BN >= 0, **options)

    return loss


def hinge_by_score(margin: float, grade_per_step: float):
    """The hinge, `gap_mean`, with a margin that grows with the difference in grade.

    `margin` is that of an average step in rank, which is worth `grade_per_step`.
    """

    def loss(scores_BN, ranks_BN, grades_BN):
        steps_BNN = distances(ranks_BN)
        lead_BNN = grades_BN[:, :, None] - grades_BN[:, None, :]
        behind_BNN = scores_BN[:, None, :] - scores_BN[:, :, None]
        hinge_BNN = (behind_BNN + margin / grade_per_step * lead_BNN).clamp_min(0)
        return sum(hinge_BNN[steps_BNN == gap].mean() for gap in range(1, int(steps_BNN.max()) + 1))

    return loss


# RRHF (arXiv 2304.05302): the sum over pairs of max(0, v_j - v_i), without a margin.
rrhf = ranking(margin=0.0, reduction="pair_sum")


def in_two_bins(rank_loss):
    """A loss on two ranks: the better half of the ranks and the worse one; a middle rank counts as better."""

    def loss(scores_BN, ranks_BN, grades_BN):
        worst_B1 = ranks_BN.amax(-1, keepdim=True)
        bins_BN = (2 * ranks_BN > worst_B1).long().masked_fill(ranks_BN < 0, -1)
        return rank_loss(scores_BN, bins_BN, grades_BN)

    return loss


def nothing(scores_BN, ranks_BN, grades_BN):
    """No ranking at all: the likelihood term is left."""
    return scores_BN.new_zeros(())
