"""Options of `TrainingArguments` that would have no effect, or do harm, in `TunaTrainer`; `TunaConfig` rejects them.

`tests/training/test_options.py` lists every option of the installed transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

_COMPILED = "`compile` compiles each layer for any number of tokens; the whole model would be compiled for every shape"
_FULL_EVAL = "it casts the trained adapters, which have to stay in fp32, for good"

# Option -> why any value but the default is rejected.
REFUSED = {
    "label_smoothing_factor": "neither the ranking loss nor the SFT loss (NLL) term is smoothed",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": "`compile` fuses the same operations, and log-probabilities need no fused loss",
    "liger_kernel_config": "there is no `use_liger_kernel`",
    "use_cache": "training needs no key-value cache",
    "average_tokens_across_devices": "the loss is averaged over the prompts and tokens of all processes, always",
    "logging_nan_inf_filter": "training stops at the first loss that is not finite",
    "label_names": "labels are the data set's `ranks`",
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "parallelism_config": "tensor and context parallelism are not supported",
}


def refuse_options(args: Any) -> None:
    """Checks a `TunaConfig`, before `TrainingArguments.__post_init__` changes its values.

    Raises:
        ValueError: An option has a value that `TunaTrainer` does not support; names it and says why.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if name in defaults and value != defaults[name]:
            raise ValueError(f"{name}={value!r} is not supported by TunaTrainer: {reason}. Leave it out.")
    if "inputs" in (args.include_for_metrics or ()):
        raise ValueError(
            "include_for_metrics=['inputs'] is not supported by TunaTrainer: inputs are packed sequences."
        )
