"""Options of the ranking loss that exclude each other, and what a loss needs from the data."""

from __future__ import annotations

from typing import Any

from tuna_peft.training.pair_losses import PAIR_LOSSES

_LOSSES_ON_SCORES = ("info_nca", "nca")
_LOSSES_ON_LOG_RATIOS = ("nca", "qrpo")


def needs_scores(loss_type: str, margin_by: str, pair_weight: str) -> bool:
    """Whether ranks alone are not enough for a loss with these options of `TunaConfig`."""
    return loss_type in _LOSSES_ON_SCORES or margin_by == "score" or pair_weight == "lambda"


def conflict(config: Any) -> str | None:
    """What is wrong with the loss options of a `TunaConfig`, in one sentence; None if nothing is."""
    loss, over_list = config.loss_type, config.loss_type not in PAIR_LOSSES
    below = config.reference == "below"
    pairs = f"loss_type={loss!r} has none: use {' or '.join(map(repr, PAIR_LOSSES))}"
    for excluded, what in (
        (over_list and config.margin == "auto", f"margin='auto' belongs to losses over pairs, and {pairs}"),
        (over_list and config.margin_by == "score", f"margin_by='score' belongs to losses over pairs, and {pairs}"),
        (over_list and config.pair_weight == "lambda", f"pair_weight='lambda' weights pairs, and {pairs}"),
        (
            below and config.margin == "auto",
            "margin='auto' measures differences before training, and with reference='below' all are 0 then: "
            "use a number",
        ),
        (
            loss in _LOSSES_ON_LOG_RATIOS and not below,
            f"loss_type={loss!r} is defined on log-ratios: use reference='below'",
        ),
    ):
        if excluded:
            return what
    return None
