"""The main memory that this process can have."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_ram() -> float:
    """Bytes: what the kernel would give without swapping, or the container's limit where that is less."""
    limits = [_of_kernel()]
    for file in _CGROUP:
        try:
            limits.append(float(file.read_text()))
        except (OSError, ValueError):  # no cgroup, or "max"
            continue
    return min(limits)


def _of_kernel() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
