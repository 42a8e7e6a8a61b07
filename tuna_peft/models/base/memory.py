"""Free memory of a device, and how to get the memory of models back that are no longer referenced."""

from __future__ import annotations

import gc

import torch

from tuna_peft.limits import available_ram


def free_memory() -> None:
    """Runs the garbage collector and empties the GPU's cache.

    A PEFT model has reference cycles, so `del` alone frees nothing.
    """
    gc.collect()
    torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> float:
    """Bytes that tensors can still take: main memory, or a GPU's free memory with what its allocator holds unused."""
    if device.type != "cuda":
        return available_ram()
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
