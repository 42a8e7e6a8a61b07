"""Memory that models without a name still hold."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Gives it back, to the GPU as well: a PEFT model is full of cycles, which only the collector ends."""
    gc.collect()
    torch.cuda.empty_cache()
