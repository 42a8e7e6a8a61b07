"""The Tuna ranking loss (Li et al. 2023, https://arxiv.org/abs/2310.13385, section 3), and others for ranked lists.

`TunaTrainer.compute_loss` calls `RankingLoss`; `tuna_loss` is the function for other code. The formulas are in
`pair_losses.py` and `list_losses.py`.

Shape suffixes: B prompts, N responses of a prompt, G = N - 1 differences in rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from tuna_peft.training.list_losses import LIST_LOSSES
from tuna_peft.training.pair_losses import PAIR_LOSSES, lambda_weights
from tuna_peft.training.ranks import PairCounts, dense_ranks, distances

Reduction = Literal["gap_mean", "pair_sum"]
LossType = Literal["hinge", "logistic", "list_mle", "mpo", "info_nca", "nca", "qrpo"]
MarginBy = Literal["rank", "score"]
PairWeight = Literal["equal", "lambda"]


@dataclass(frozen=True)
class RankingLoss:
    r"""A loss over a prompt's ranked responses, with \(v\) and ranks \(r\).

    \(v\) is the length-normalized log-probability of a response or, with `reference: below`, its log-ratio to the
    stack below.

    Over pairs, for every response \(i\) better than \(j\), with \(x = v_j - v_i + m\,(r_j - r_i)\):

    - `hinge`, Tuna's: \(\max(0, x)\).
    - `logistic`: \(\log(1 + \exp(\beta x))\), SimPO's loss (https://arxiv.org/abs/2405.14734, with
      \(\gamma = \beta m\) per step) over all pairs of a prompt's responses; DPO's on log-ratios with \(m = 0\).

    Over whole lists, see `tuna_peft.training.list_losses`: `list_mle`, `mpo`, `info_nca`, `nca` and `qrpo`. They are
    averaged over prompts; `margin`, `margin_by`, `pair_weight` and `reduction` have no effect.

    Attributes:
        loss_type: One of these names.
        margin: \(m\) per step in rank.
        reduction: `gap_mean`, as in the released code: the mean over all pairs of a batch that are g steps apart,
            summed over g. `pair_sum`, the paper's formula: the sum over a prompt's pairs, averaged over prompts.
        beta: Inverse temperature \(\beta\) of all but `hinge`.
        margin_by: What the margin is multiplied by: the difference in `rank`, or in `score`.
        pair_weight: `equal`, or `lambda`: those of LambdaLoss, see `tuna_peft.training.pair_losses.lambda_weights`.
        score_scale: Scores are divided by this before a loss uses them.
    """

    loss_type: LossType = "hinge"
    margin: float = 0.1
    reduction: Reduction = "gap_mean"
    beta: float = 2.0
    margin_by: MarginBy = "rank"
    pair_weight: PairWeight = "equal"
    score_scale: float = 1.0

    def __post_init__(self) -> None:
        choices = {"loss_type": LossType, "reduction": Reduction, "margin_by": MarginBy, "pair_weight": PairWeight}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                known = " or ".join(repr(choice) for choice in get_args(literal))
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use {known}")

    def __call__(
        self,
        v_BN: torch.Tensor,
        ranks_BN: torch.Tensor,
        counts: PairCounts,
        grades_BN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The part of the loss that this batch contributes, averaged over `counts`.

        Args:
            v_BN: `(batch, n)` length-normalized log-probabilities, or log-ratios.
            ranks_BN: `(batch, n)` dense ranks, see `dense_ranks`; -1 where a response is missing.
            counts: Pairs and prompts of this batch, or of the whole optimizer step that it belongs to; `pairs_G` has
                at least n - 1 entries.
            grades_BN: `(batch, n)` scores of the data, higher is better, for the losses that use them.

        Returns:
            A scalar. With the counts of the step, the results of its micro-batches add up to the loss of the step.
        """
        sums_G = self.sums(v_BN, ranks_BN, grades_BN)
        denominators_G = self.denominators(counts)[: len(sums_G)]
        return sums_G @ denominators_G.clamp_min(1).double().reciprocal().to(sums_G)

    def sums(self, v_BN: torch.Tensor, ranks_BN: torch.Tensor, grades_BN: torch.Tensor | None = None) -> torch.Tensor:
        """The losses of a batch, not averaged yet, so that those of different batches add up.

        Returns:
            `(G,)` by difference in rank for `gap_mean`; `(1,)` for what is averaged over prompts.
        """
        present_BN = ranks_BN >= 0
        # Missing responses may have any v, even NaN, which must not reach the sum or the gradient.
        v_BN = v_BN.masked_fill(~present_BN, 0.0)
        grades_BN = torch.zeros_like(v_BN) if grades_BN is None else grades_BN.to(v_BN) / self.score_scale
        if self.loss_type in LIST_LOSSES:
            return LIST_LOSSES[self.loss_type](v_BN, ranks_BN, grades_BN, self.beta).sum()[None]
        steps_BNN = distances(ranks_BN)
        violations_BNN = v_BN[:, None, :] - v_BN[:, :, None] + self.margin * self.margin_units(ranks_BN, grades_BN)
        losses_BNN = PAIR_LOSSES[self.loss_type](violations_BNN, self.beta)
        if self.pair_weight == "lambda":
            losses_BNN = losses_BNN * lambda_weights(v_BN, present_BN, grades_BN)
        # Sums by difference in rank, because `gap_mean` averages each of them over its own number of pairs.
        gaps = range(1, v_BN.shape[1])
        if not gaps:
            return v_BN.sum()[None] * 0  # zero, with a gradient: `backward` must work for a batch without pairs
        sums_G = torch.stack([losses_BNN.masked_fill(steps_BNN != gap, 0.0).sum() for gap in gaps])
        return sums_G if self.reduction == "gap_mean" else sums_G.sum()[None]

    def margin_units(self, ranks_BN: torch.Tensor, grades_BN: torch.Tensor) -> torch.Tensor:
        """`(B, N, N)`: what the margin of a pair is multiplied by; `grades_BN` is divided by `score_scale`."""
        if self.margin_by == "score":
            return grades_BN[:, :, None] - grades_BN[:, None, :]
        return distances(ranks_BN).to(grades_BN)

    def denominators(self, counts: PairCounts) -> torch.Tensor:
        """The numbers of pairs, or of prompts, that the `sums` are averaged over; `(G,)` or `(1,)`."""
        by_gap = self.reduction == "gap_mean" and self.loss_type in PAIR_LOSSES
        return counts.pairs_G if by_gap else counts.prompts[None]


def tuna_loss(
    scores: torch.Tensor,
    *,
    ranks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    grades: torch.Tensor | None = None,
    margin: float = 0.1,
    reduction: Reduction = "gap_mean",
    loss_type: LossType = "hinge",
    beta: float = 2.0,
    margin_by: MarginBy = "rank",
    pair_weight: PairWeight = "equal",
    score_scale: float = 1.0,
) -> torch.Tensor:
    """The ranking loss of one batch, see `RankingLoss` for the formulas.

    Args:
        scores: `(batch, n)` length-normalized log-probabilities, best response first.
        ranks: `(batch, n)` integers, lower is better, equal where tied; only their order matters. Tied responses form
            no pair and count as one rank. By default the position among the responses that are not missing.
        mask: `(batch, n)` booleans, False where a response is missing (prompts may have fewer than n).
        grades: `(batch, n)` scores of the responses by a judge or by people, higher is better; for `info_nca`, `nca`,
            `margin_by="score"` and `pair_weight="lambda"`.
        margin, reduction, loss_type, beta, margin_by, pair_weight, score_scale: See `RankingLoss`.

    Returns:
        A scalar; 0 where no pair exists.

    Raises:
        ValueError: Shapes differ, or the reduction or the type is unknown.
    """
    loss = RankingLoss(loss_type, margin, reduction, beta, margin_by, pair_weight, score_scale)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if ranks is None:
        ranks = mask.long().cumsum(-1)
    if scores.dim() != 2 or ranks.shape != scores.shape or mask.shape != scores.shape:
        raise ValueError(
            f"scores, ranks and mask must share the shape (batch, n); got {tuple(scores.shape)}, "
            f"{tuple(ranks.shape)}, {tuple(mask.shape)}"
        )
    ranks = dense_ranks(ranks, mask)
    return loss(scores, ranks, PairCounts.of(ranks), grades)
