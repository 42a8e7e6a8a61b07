"""Every contestant by name. The order is that in which they run: the most telling ones first.

An arm is a function from a model to a function from rows to the loss of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.contest import objectives as lists
from benchmarks.contest import pairs
from benchmarks.contest.pairs import Objective, best_and_worst
from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward.scoring import response_logps


@dataclass(frozen=True)
class Arm:
    """One contestant.

    Attributes:
        objective: What it minimises.
        label: As the table says it.
        ours: Whether `TunaTrainer`'s loss, or a variant of it.
    """

    objective: Objective
    label: str
    ours: bool = False


def on_lists(rank_loss: Callable[..., torch.Tensor], mle_on: str = "all", mle_weight: float = 1.0) -> Objective:
    """A ranking loss plus `mle_weight` times the token mean of cross-entropy, on rows that share their prompt."""
    collate = RankedCollator(pad_token_id=0, mle_on=mle_on)

    def on(model):
        def loss(rows):
            batch = collate(rows)
            logps = response_logps(model, batch)
            value = rank_loss(logps.normalised(), batch.ranks_BN, _grades(rows, batch.ranks_BN))
            if mle_weight:
                covered = batch.mle_BN
                value = value - mle_weight * logps.sums_BN[covered].sum() / logps.lengths_BN[covered].sum()
            return value

        return loss

    return on


def _grades(rows, ranks_BN):
    """`(B, N)`: the scores that the ranks come from; zeros where the data has ranks alone."""
    grades_BN = torch.zeros(ranks_BN.shape)
    for b, row in enumerate(rows):
        scores = row.get("scores") or []
        grades_BN[b, : len(scores)] = torch.tensor(scores)
    return grades_BN


def best_only() -> Objective:
    """Supervised fine-tuning on the best response of each list: nothing else is computed."""
    on = on_lists(lists.nothing, "best")

    def best(row):
        first = min(range(len(row["ranks"])), key=row["ranks"].__getitem__)
        return {**row, **{key: [row[key][first]] for key in _BY_RESPONSE}, "scores": None}

    return lambda model: lambda rows: on(model)([best(row) for row in rows])


_BY_RESPONSE = ("completions_ids", "completion_skips", "ranks")

GRADE_PER_STEP = 0.26
"""Mean difference in grade over mean difference in rank of the training lists; a test checks it."""

_LOGISTIC = lists.ranking(loss_type="logistic")  # beta 2, as SimPO's paper has it
_PLACKETT_LUCE = lists.ranking(loss_type="list_mle", beta=1.0)

ARMS = {
    "tuna": Arm(on_lists(lists.ranking()), "Tuna as released: hinge, gap_mean, m 0.1, MLE on all", True),
    "dpo": Arm(pairs.dpo(), "DPO, all pairs (TRL)"),
    "simpo": Arm(pairs.simpo(), "SimPO, all pairs (TRL)"),
    "best-sft": Arm(best_only(), "SFT on the best of each list"),
    "tuna-mle-best": Arm(on_lists(lists.ranking(), "best"), "hinge, gap_mean, m 0.1, MLE on best", True),
    "tuna-logistic-best": Arm(on_lists(_LOGISTIC, "best"), "logistic, gap_mean, m 0.1, MLE on best", True),
    "rrhf": Arm(on_lists(lists.rrhf, "best"), "RRHF's loss"),
    "list-mle": Arm(on_lists(_PLACKETT_LUCE, "best"), "Plackett-Luce (ListMLE) + MLE on best"),
    "orpo": Arm(pairs.orpo(), "ORPO, all pairs (TRL)"),
    "cpo": Arm(pairs.cpo(), "CPO, all pairs (TRL)"),
    "tuna-logistic": Arm(on_lists(_LOGISTIC), "logistic, gap_mean, m 0.1, MLE on all", True),
    "tuna-pair-sum": Arm(on_lists(lists.ranking(reduction="pair_sum")), "hinge, pair_sum, m 0.1, MLE on all", True),
    "tuna-no-mle": Arm(on_lists(lists.ranking(), mle_weight=0.0), "hinge, gap_mean, m 0.1, no MLE", True),
    "tuna-logistic-no-mle": Arm(
        on_lists(_LOGISTIC, mle_weight=0.0),
        "logistic, gap_mean, m 0.1, no MLE (SimPO's over lists)",
        True,
    ),
    "tuna-m0": Arm(on_lists(lists.ranking(margin=0.0)), "hinge, gap_mean, m 0, MLE on all", True),
    "tuna-m0.05": Arm(on_lists(lists.ranking(margin=0.05)), "hinge, gap_mean, m 0.05, MLE on all", True),
    "tuna-m0.2": Arm(on_lists(lists.ranking(margin=0.2)), "hinge, gap_mean, m 0.2, MLE on all", True),
    "tuna-by-score": Arm(
        on_lists(lists.hinge_by_score(0.1, GRADE_PER_STEP)), "hinge, gap_mean, margin by score, MLE on all", True
    ),
    "tuna-mle-best-3": Arm(
        on_lists(lists.ranking(), "best", mle_weight=3.0), "hinge, gap_mean, m 0.1, 3 x MLE on best", True
    ),
    "tuna-mle-best-10": Arm(
        on_lists(lists.ranking(), "best", mle_weight=10.0), "hinge, gap_mean, m 0.1, 10 x MLE on best", True
    ),
    # Where compute is what is equal, pairs are taken as preference data usually has them: one of a list.
    "dpo-one-pair": Arm(pairs.dpo(best_and_worst), "DPO, best against worst (TRL)"),
    "simpo-one-pair": Arm(pairs.simpo(best_and_worst), "SimPO, best against worst (TRL)"),
    "orpo-one-pair": Arm(pairs.orpo(best_and_worst), "ORPO, best against worst (TRL)"),
    "cpo-one-pair": Arm(pairs.cpo(best_and_worst), "CPO, best against worst (TRL)"),
}
