"""What a report says about the machine: the peak memory of a stage, and the versions and hardware of the run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import tuna_peft
from tuna_peft.export.output import peak_rss_bytes
from tuna_peft.limits import GIB

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


class Peak:
    """Peak memory: of the GPU's allocator since this object was created; on a CPU, of the process since its start."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        if self._gpu:
            torch.cuda.reset_peak_memory_stats(self._gpu)

    def as_dict(self) -> dict[str, Any]:
        """`peak_memory_gib`, and `peak_memory_of`: `cuda` or `process`."""
        peak = torch.cuda.max_memory_allocated(self._gpu) if self._gpu else peak_rss_bytes() or 0
        return {"peak_memory_gib": round(peak / GIB, 3), "peak_memory_of": "cuda" if self._gpu else "process"}


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"tuna_peft": tuna_peft.__version__, **{name: version(name) for name in _PACKAGES}},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
