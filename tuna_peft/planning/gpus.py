"""GPUs by name: memory, FLOP/s, bandwidth, and whether they support bf16."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from tuna_peft.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """The specifications of a GPU, from its vendor's data sheet.

    Attributes:
        name: Its usual name.
        memory_gib: GiB that the driver offers to programs, a little less than the number in the name.
        tflops: Dense 16-bit tensor-core TFLOP/s with fp32 accumulation.
        gb_per_second: Memory bandwidth in GB/s.
        bf16: Whether it supports bf16 natively (compute capability 8.0 or later).
        aliases: Other names.
        measured: Whether this is a CPU, and its rates were measured, see `cpu_speed`.
        fused_rows: Rows of a product up to which bitsandbytes 0.50 reads 4-bit weights inside the kernel, without
            dequantizing them first: 4 everywhere, up to 64 on Turing (T4), for the layers that hold most weights.
    """

    name: str
    memory_gib: float
    tflops: float
    gb_per_second: float
    bf16: bool = True
    aliases: tuple[str, ...] = ()
    measured: bool = False
    fused_rows: int = 4


GPUS = (
    Gpu("T4", 14.7, 65, 320, bf16=False, aliases=("Tesla T4", "T4 16GB", "Colab"), fused_rows=64),
    Gpu("V100 16GB", 15.8, 125, 900, bf16=False),
    Gpu("V100 32GB", 31.7, 125, 900, bf16=False),
    Gpu("RTX 2080 Ti", 10.7, 54, 616, bf16=False, fused_rows=64),
    Gpu("RTX 3060 12GB", 11.7, 25, 360, aliases=("RTX 3060",)),
    Gpu("RTX 3070 8GB", 7.7, 40, 448, aliases=("RTX 3070", "RTX 3070 Ti")),
    Gpu("RTX 3080 10GB", 9.7, 59, 760, aliases=("RTX 3080",)),
    Gpu("RTX 3090", 23.6, 71, 936, aliases=("RTX 3090 24GB",)),
    Gpu("RTX 4060 8GB", 7.6, 30, 272, aliases=("RTX 4060",)),
    Gpu("RTX 4060 Ti 16GB", 15.6, 44, 288),
    Gpu("RTX 4070 12GB", 11.6, 58, 504, aliases=("RTX 4070", "RTX 4070 Super")),
    Gpu("RTX 4080 16GB", 15.6, 97, 717, aliases=("RTX 4080", "RTX 4080 Super")),
    Gpu("RTX 4090", 23.5, 165, 1008, aliases=("RTX 4090 24GB",)),
    Gpu("RTX 5090", 31.3, 209, 1792, aliases=("RTX 5090 32GB",)),
    Gpu("L4", 22.0, 121, 300, aliases=("L4 24GB",)),
    Gpu("A10", 22.0, 125, 600, aliases=("A10G", "A10 24GB", "A10G 24GB")),
    Gpu("RTX A6000", 47.4, 155, 768, aliases=("A6000", "A6000 48GB")),
    Gpu("RTX 6000 Ada", 47.4, 364, 960, aliases=("RTX 6000 Ada 48GB",)),
    Gpu("L40S", 44.4, 362, 864, aliases=("L40S 48GB",)),
    Gpu("A100 40GB", 39.4, 312, 1555, aliases=("A100-SXM4-40GB", "A100-PCIE-40GB")),
    Gpu("A100 80GB", 79.1, 312, 2039, aliases=("A100", "A100-SXM4-80GB", "A100 80GB PCIe")),
    Gpu("H100 80GB", 79.1, 989, 3350, aliases=("H100", "H100 80GB HBM3", "H100 SXM")),
    Gpu("H100 PCIe", 79.1, 756, 2039),
    Gpu("H200", 139.8, 989, 4800, aliases=("H200 141GB",)),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of this name. Case, spaces, `NVIDIA`, `GeForce` and `RTX` do not matter.

    Raises:
        UserError: The GPU is unknown; the message has the most similar name and all known ones.
    """
    by_name = {_plain(alias): gpu for gpu in GPUS for alias in (gpu.name, *gpu.aliases)}
    wanted = _plain(name)
    if wanted in by_name:
        return by_name[wanted]
    near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.6)
    guess = f"Did you mean {by_name[near[0]].name!r}? " if near else ""
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(f"unknown GPU {name!r}", where="--gpu", fix=f"{guess}Known: {known}. Without --gpu: this machine.")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|tesla|\s|-|_", "", name.lower())
