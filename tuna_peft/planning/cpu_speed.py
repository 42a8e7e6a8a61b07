"""How fast this CPU multiplies matrices and reads memory, measured for a second: the basis of a plan's hours."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tuna_peft.planning.gpus import Gpu

# Rows, inputs and outputs of the timed product, and numbers of the timed copy: larger than a CPU's caches.
_ROWS, _WIDTH, _COPIED = 512, 2048, 2**24


def cpu_speed(dtype: torch.dtype, seconds: float = 1.0) -> Gpu:
    """This CPU as an entry of the GPUs' table.

    Args:
        dtype: The dtype of the products.
        seconds: How long to measure, half of it products.
    """
    rows, weight = (torch.ones(size, _WIDTH, dtype=dtype) for size in (_ROWS, _WIDTH))
    source = torch.ones(_COPIED)
    target = torch.empty_like(source)
    product = _shortest(lambda: torch.mm(rows, weight), seconds / 2)
    copy = _shortest(lambda: target.copy_(source), seconds / 2)
    flops, moved = 2.0 * _ROWS * _WIDTH**2, 2.0 * source.nbytes
    return Gpu("CPU", 0.0, flops / product / 1e12, moved / copy / 1e9, measured=True)


def _shortest(work: Callable[[], object], seconds: float) -> float:
    """The shortest time of `work`, which is repeated for some seconds, at least twice."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
