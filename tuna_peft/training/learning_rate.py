"""`learning_rate: auto`: a rate for LoRA from the width of the model."""

from __future__ import annotations

# Losses on log-ratios (DPO) sum log-probabilities over tokens; the others are means over tokens.
_RANKING, _LOG_RATIOS = 1 / 3, 1 / 20


def auto_learning_rate(hidden_size: int, *, ranking: bool, log_ratios: bool = False) -> float:
    """The learning rate for LoRA adapters on a model of this width, with two digits.

    SFT: 5e-5 * 10 * (2000 / hidden_size) ** 0.781, the formula of Tinker's cookbook for LLaMA models (10 is LoRA
    against full fine-tuning). Ranking: a third of it, which is 1e-4 at a width of 4096. On log-ratios: a twentieth.

    Args:
        ranking: Whether the stage trains a ranking loss.
        log_ratios: Whether that loss is taken on log-ratios, `reference: below`.
    """
    rate = 5e-5 * 10 * (2000 / hidden_size) ** 0.781
    return float(f"{rate * (_LOG_RATIOS if log_ratios else _RANKING if ranking else 1):.1e}")
