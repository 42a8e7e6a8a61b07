"""Whether this CPU computes a model faster in bf16 than in fp32; `resolve_dtype` asks.

bf16 pays only where the CPU multiplies bf16 matrices in hardware (AMX-BF16, or AVX512-BF16); elsewhere it is emulated,
and slower than fp32. A flag alone proves little (virtual machines, old libraries), so the products are timed too.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

from tuna_peft.limits import SMALL_MODEL, cpu_flags

FLAGS = ("amx_bf16", "avx512_bf16")
# bf16 is chosen when its products are at least this many times as fast: below that, fp32 is worth more than the time.
GAIN = 1.5
# Sizes of the timed products: rows, and at most this many columns.
_ROWS, _WIDEST = 128, 2048


class CpuBf16(NamedTuple):
    """The decision, and its reason in words."""

    fast: bool
    reason: str


def cpu_bf16(hidden: int | None = None) -> CpuBf16:
    """Whether `auto` is bf16 on this CPU.

    Args:
        hidden: Hidden size of the model; None for a large one.
    """
    if hidden is not None and hidden < SMALL_MODEL:
        return CpuBf16(False, f"the model is small (hidden size {hidden}), and fp32 costs it little")
    flags = [name for name in FLAGS if name in cpu_flags()]
    if not flags:
        return CpuBf16(False, f"the CPU has neither {' nor '.join(FLAGS)}")
    gain = measured_gain(min(hidden or _WIDEST, _WIDEST))
    what = f"the CPU has {flags[0]}, and its bf16 products take {1 / gain:.2f} of the time of fp32"
    return CpuBf16(gain >= GAIN, what if gain >= GAIN else f"{what}, which is too little a gain")


@functools.cache
def measured_gain(width: int) -> float:
    """Time of fp32 products over that of bf16 ones, each the shortest of five; measured once in a process."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(_ROWS, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            taken.append(time.perf_counter() - started)
        seconds[dtype] = min(taken)
    return seconds[torch.float32] / seconds[torch.bfloat16]
