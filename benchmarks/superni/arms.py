"""The arms by name, in the order in which they run: stages of a recipe, with the settings that differ.

An arm with a new loss is one line: its fields of `TunaConfig`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

LISTS, PAIRS, GOLD = "contextual-lists", "contextual-pairs", "contextual-gold"
FEW_GOLD = "few-gold"
OWN_LISTS = f"{FEW_GOLD}-lists"
"""Samples of the arm `FEW_GOLD` for the same prompts as `LISTS`, which are the base's."""
REFERENCE_ARM = "tuna-best"
"""Its FLOPs are the budget of every stage."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of an arm.

    Attributes:
        type: As in a recipe; `sft` takes the best response of each list.
        data: A data set of the work folder.
        train: Fields of `TunaConfig` beside those that all arms share.
        rounds: Above 1: own samples in each round, ranked by the grader, in one adapter.
        reference_passes: Forward passes of a reference model in a step.
        rate_of: The single arm whose learning rate it has; None for the arm's own, as an arm's last stage has.
    """

    type: Literal["sft", "ranking"]
    data: str = LISTS
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounds: int = 1
    reference_passes: int = 0
    rate_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm.

    Attributes:
        label: As tables say it.
        stages: In the order of training.
        decides: Whether it belongs to the protocol's primary comparisons.
        ranks: Whether it learns from the order of responses.
        also_against: Arms that it is compared with besides the base and RAFT, such as its first stage alone.
    """

    label: str
    stages: tuple[Stage, ...]
    decides: bool = False
    ranks: bool = True
    also_against: tuple[str, ...] = ()


def _over_lists(label: str, *, decides: bool = False, **train: Any) -> Arm:
    return Arm(label, (Stage("ranking", LISTS, train),), decides)


def _to_the_base(label: str, data: str = LISTS, *, decides: bool = False, **train: Any) -> Arm:
    """An arm on log-ratios to the base, without a likelihood term."""
    return Arm(label, (Stage("ranking", data, {**_LOG_RATIOS, **train}, reference_passes=1),), decides)


_LOG_RATIOS = {"reference": "below", "length_penalty": 0.0, "margin": 0.0, "beta": 0.1, "mle_weight": 0.0}
_DPO = {"loss_type": "logistic", "reduction": "pair_sum"}
_GRADES = {"score_scale": 0.2}  # grades are between 0 and 1; these losses take scores that differ by 1 to 5

BASE, RAFT = "base", "raft"
_TUNA_BEST = Stage("ranking", LISTS, {"mle_on": "best"})
_FEW_GOLD_FIRST = Stage("sft", "sft", rate_of=FEW_GOLD)
_AFTER_FEW_GOLD = "SFT on few gold rows, then"

ARMS = {
    RAFT: Arm("SFT on the best sample (RAFT)", (Stage("sft"),), decides=True, ranks=False),
    REFERENCE_ARM: Arm("Tuna, likelihood on the best", (_TUNA_BEST,), decides=True),
    "dpo": _to_the_base("DPO, best against worst", PAIRS, decides=True, **_DPO),
    "logistic-best": _over_lists(
        "logistic, likelihood on the best", decides=True, loss_type="logistic", mle_on="best"
    ),
    "tuna": _over_lists("Tuna as released"),
    "gold": Arm("SFT on gold (ceiling)", (Stage("sft", GOLD),), ranks=False),
    "list-mle-best": _over_lists(
        "Plackett-Luce, likelihood on the best", loss_type="list_mle", beta=1.0, mle_on="best"
    ),
    "dpo-lists": _to_the_base("DPO, all pairs", **_DPO),
    "lambda-best": _over_lists(
        "LambdaLoss, likelihood on the best", loss_type="logistic", pair_weight="lambda", mle_on="best", **_GRADES
    ),
    "nca": _to_the_base("NCA", loss_type="nca", **_GRADES),
    "qrpo": _to_the_base("QRPO", loss_type="qrpo"),
    "two-rounds": Arm("Tuna, likelihood on the best, two rounds", (dataclasses.replace(_TUNA_BEST, rounds=2),)),
    "teacher": Arm("probabilistic: a teacher's order", (Stage("ranking", "probabilistic-lists"),)),
    "teacher-tuna-best": Arm(
        "probabilistic, then Tuna",
        (Stage("ranking", "probabilistic-lists", rate_of="teacher"), _TUNA_BEST),
        also_against=("teacher",),
    ),
    FEW_GOLD: Arm("SFT on few gold rows", (Stage("sft", "sft"),), ranks=False),
    "few-gold-tuna-best": Arm(
        f"{_AFTER_FEW_GOLD} Tuna", (_FEW_GOLD_FIRST, _TUNA_BEST), also_against=(FEW_GOLD, "few-gold-raft")
    ),
    "few-gold-raft": Arm(
        f"{_AFTER_FEW_GOLD} RAFT", (_FEW_GOLD_FIRST, Stage("sft")), ranks=False, also_against=(FEW_GOLD,)
    ),
    "few-gold-own-tuna": Arm(
        f"{_AFTER_FEW_GOLD} Tuna on its own samples",
        (_FEW_GOLD_FIRST, dataclasses.replace(_TUNA_BEST, data=OWN_LISTS)),
        also_against=(FEW_GOLD, "few-gold-own-raft"),
    ),
    "few-gold-own-raft": Arm(
        f"{_AFTER_FEW_GOLD} RAFT on its own samples",
        (_FEW_GOLD_FIRST, Stage("sft", OWN_LISTS)),
        ranks=False,
        also_against=(FEW_GOLD,),
    ),
}
