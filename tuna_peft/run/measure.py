"""What a report says about the machine: the versions and hardware of the run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import tuna_peft

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"tuna_peft": tuna_peft.__version__, **{name: version(name) for name in _PACKAGES}},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
