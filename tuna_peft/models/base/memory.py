"""Frees the memory of models that are no longer referenced."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Runs the garbage collector and empties the GPU's cache.

    A PEFT model has reference cycles, so `del` alone frees nothing.
    """
    gc.collect()
    torch.cuda.empty_cache()
