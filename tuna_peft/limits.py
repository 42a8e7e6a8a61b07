"""Limits that a run obeys and a plan must know: context, device rules, sizes of allocations, main memory.

Both `tuna_peft.planning` and the code that runs import them from here, so that a plan and the run cannot disagree. The
module imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

# Bytes of a GiB.
GIB = 2**30
# Tokens whose logits are in memory at a time: for 256 tokens and a vocabulary of 128k they take 134 MB in fp32.
CHUNK_ROWS = 256
# Rows of a 16-bit head that are converted to fp32 at a time while exports are measured: 134 MB for 4,096 columns.
FP32_ROWS = 8192
# Models of a smaller hidden size compute in fp32 on every CPU: their products are too small for bf16 to gain much.
SMALL_MODEL = 512
# Packed sequences are padded to a multiple of this many tokens.
PAD_TO = 8
# Packed sequences of at least this many tokens use attention segment by segment, shorter ones a dense mask.
LONG_ROW = 512
# Batches that are sampled as one block: within it, sequences that have ended are replaced by waiting ones. An
# interrupted run repeats the block that it was in.
BATCHES_IN_BLOCK = 4
# Tokens of free space that a growing key-value cache allocates beyond the tokens that it must store.
CACHE_ROOM = 64
# Where no plan says how much fits: responses that are generated at once, tokens of a forward pass in training and
# scoring, and questions that a local judge answers at once.
UNPLANNED_BATCH, UNPLANNED_TOKENS, UNPLANNED_QUESTIONS = 32, 4096, 8
# Weights that share a scale in 4-bit quantization, and scales that share a scale in double quantization: defaults
# of bitsandbytes.
QUANTIZATION_BLOCK, SCALES_BLOCK = 64, 256
# Share of a GPU's free memory that kept activations may fill; the rest is for fragmentation, as the allocator's blocks
# never fit exactly.
ACTIVATIONS_ON_GPU = 0.92
# The same with several processes, which cannot repeat a step that runs out of memory.
ACTIVATIONS_ON_GPUS = 0.8
# The same share of main memory, which other programs need too.
ACTIVATIONS_IN_RAM = 0.5
# Share of free memory, on a GPU or in main memory, that a dense copy of the weights may take while a model generates;
# the rest is for keys and values.
DENSE_COPY = 0.5
# Adapter ranks that vLLM accepts as `--max-lora-rank`; an adapter of another rank takes the next larger one.
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Share of free memory, on a GPU or in main memory, that the weights of a merged model may fill while it is compared
# with the unmerged adapters; the rest is for activations and logits.
MERGED_WEIGHTS = 0.9

# Root of the kernel's files; tests replace it.
_ROOT = Path("/")
# Files of a control group, versions 1 and 2: limit, memory in use, and the keys of the file cache, a part of it.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))


def merged_weights_on_gpu(free: float, head: int) -> float:
    """Bytes of a GPU that a merged model's weights may fill while it is compared with the unmerged adapters.

    Args:
        free: Free bytes.
        head: Weights of the head, which is converted to fp32 when it is used.
    """
    return max(MERGED_WEIGHTS * free - 4.0 * head, 0.0)


def is_ampere_or_later(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has native bf16 and FlashAttention: Ampere (8.0) or later.

    `torch.cuda.is_bf16_supported` also accepts emulation, which is slow on a T4.
    """
    return capability >= (8, 0)


def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets, as Linux reports them; empty on other systems."""
    try:
        lines = (_ROOT / "proc/cpuinfo").read_text().splitlines()
    except (OSError, ValueError):
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def packs_fp16(hidden: int) -> bool:
    """Whether a model in fp32 multiplies by fp16 weights while it generates on this CPU.

    FBGEMM, which does it, needs AVX2. Small models gain little: their weights stay in the CPU's cache.
    """
    return hidden >= SMALL_MODEL and "avx2" in cpu_flags()


def context_length(config: Any) -> int | None:
    """Maximum tokens of a prompt with its response; None if the configuration names no limit.

    Args:
        config: A transformers configuration, or the contents of the `config.json` of a text model.
    """
    if isinstance(config, Mapping):
        return config.get("max_position_embeddings")
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def within_context(max_length: int | None, context: int | None) -> int | None:
    """The smaller limit on the tokens of a sequence; None if neither is given."""
    return min((length for length in (max_length, context) if length is not None), default=None)


def response_room(max_new_tokens: int, prompt_tokens: int, context: int | None) -> int:
    """Maximum tokens of a response to a prompt, as far as the context allows."""
    return min(max_new_tokens, context - prompt_tokens) if context else max_new_tokens


def prompts_per_batch(batch_size: int, n: int) -> int:
    """Prompts in a batch of `batch_size` responses, `n` to each prompt; at least one."""
    return max(1, batch_size // n)


def activation_policy(setting: str | float, *, sharded: bool = False) -> str | float:
    """The `activation_memory` in effect: `auto` is `none` if processes share a base, as their choices would differ."""
    return "none" if setting == "auto" and sharded else setting


def activations_on_gpu(processes: int) -> float:
    """Share of a GPU's free memory that kept activations may fill."""
    return ACTIVATIONS_ON_GPU if processes == 1 else ACTIVATIONS_ON_GPUS


def available_ram() -> float:
    """Bytes of main memory that this process can still allocate without swapping.

    This is what the kernel reports as available or, if that is less, what the control groups of the process (a
    container, a batch job) still allow: the limit minus the memory in use. The file cache does not count as in use,
    because the kernel reclaims it.
    Outside Linux it is the machine's whole memory, or 0 on Windows, where Python cannot read it.
    """
    return min([_available_in_system(), *_available_in_groups()])


def _available_in_system() -> float:
    try:
        lines = (_ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        if not hasattr(os, "sysconf"):  # Windows
            return 0.0
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _available_in_groups() -> Iterator[float]:
    """Bytes that each control group with a memory limit still allows: the group of this process and its parents."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, names = _ROOT / "sys/fs/cgroup/memory", _V1
        elif not controllers:
            mount, names = _ROOT / "sys/fs/cgroup", _V2
        else:
            continue
        # Inside a container the path may be that of the host, while the container's own group is the root: skip
        # folders that do not exist.
        path = PurePosixPath(group.lstrip("/"))
        for each in (path, *path.parents):
            try:
                yield _available_in_group(mount / each, *names)
            except (OSError, ValueError):  # no such group here, or its limit is "max"
                continue


def _available_in_group(folder: Path, limit: str, usage: str, cached: tuple[str, ...]) -> float:
    most, used = (float((folder / name).read_text()) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(most - used + sum(float(stat.get(key, 0)) for key in cached), 0.0)


def peak_rss_bytes() -> int | None:
    """Peak memory of this process since its start, in bytes; None on Windows."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: `getrusage` counts what the process that started this one held
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
