"""Tuna, instruction tuning from ranked responses, with stacked LoRA adapters on a 4-bit base (arXiv 2310.13385)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Lazy: `import tuna_peft` and `tuna-peft --help` load no torch.
_EXPORTS = {
    "AdapterStack": "tuna_peft.models.stack.files",
    "TunaConfig": "tuna_peft.training.config",
    "TunaTrainer": "tuna_peft.training.trainer",
    "UserError": "tuna_peft.errors",
    "load_base": "tuna_peft.models.base.load",
    "tuna_loss": "tuna_peft.training.loss",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tuna_peft' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
