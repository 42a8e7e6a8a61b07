"""The ranges of the numbers in a trainer's configuration, by field.

`tuna_peft.recipe.train_fields` checks the `train` of a recipe's stages with them, `TunaConfig` its own fields. The
module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# `(smallest, whether it is itself allowed, largest, whether it is itself allowed)`
_Range = tuple[float, bool, float, bool]
_ABOVE_0: _Range = (0, False, math.inf, False)
_FROM_0: _Range = (0, True, math.inf, False)
_FROM_1: _Range = (1, True, math.inf, False)
_SHARE: _Range = (0, True, 1, False)

_RANGES: dict[str, _Range] = {
    "learning_rate": _ABOVE_0,
    "num_train_epochs": _ABOVE_0,
    "adam_epsilon": _ABOVE_0,
    "logging_steps": _ABOVE_0,
    "save_steps": _ABOVE_0,
    "eval_steps": _ABOVE_0,
    "beta": _ABOVE_0,
    "score_scale": _ABOVE_0,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "label_smoothing_factor": _SHARE,
    "weight_decay": _FROM_0,
    "max_grad_norm": _FROM_0,
    "warmup_steps": _FROM_0,
    "neftune_noise_alpha": _FROM_0,
    "dataloader_num_workers": _FROM_0,
    "margin": _FROM_0,
    "length_penalty": _FROM_0,
    "mle_weight": _FROM_0,
    "activation_memory": _FROM_0,
    "router_aux_loss_coef": _FROM_0,
    "seed": (0, True, 2**32, False),
    "data_seed": (0, True, 2**32, False),
    "per_device_train_batch_size": _FROM_1,
    "per_device_eval_batch_size": _FROM_1,
    "gradient_accumulation_steps": _FROM_1,
    "save_total_limit": _FROM_1,
    "dataloader_prefetch_factor": _FROM_1,
    "dataset_num_proc": _FROM_1,
    "pad_to_multiple_of": _FROM_1,
    "torch_empty_cache_steps": _FROM_1,
    "eval_accumulation_steps": _FROM_1,
    "ddp_timeout": _FROM_1,
    "max_tokens_per_batch": _FROM_1,
    "max_length": (2, True, math.inf, False),
}


def out_of_range(name: str, value: Any) -> str | None:
    """What is wrong with a number in a field, or in a list or mapping that it holds; None if nothing is.

    Fields without a range of their own may hold every finite number; integers must fit into 64 bits.
    """
    if isinstance(value, Mapping):
        return next((found for part in value.values() if (found := out_of_range("", part))), None)
    if isinstance(value, list | tuple):
        return next((found for part in value if (found := out_of_range("", part))), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value != value:
        return "this is not a number."
    if abs(value) == math.inf or (isinstance(value, int) and abs(value) >= 2**63):
        return f"{value} is too large."
    if name == "max_steps" and value != -1 and value < 1:
        return f"{value} steps cannot be trained: use 1 or more, or -1 to train for `num_train_epochs`."
    low, with_low, high, with_high = _RANGES.get(name, (-math.inf, False, math.inf, False))
    if low <= value <= high and (with_low or value > low) and (with_high or value < high):
        return None
    least = f"{low} or more" if with_low else f"more than {low}"
    most = f" and less than {high}" if high < math.inf else ""
    return f"{value} is out of range: use {least}{most}."
