"""Where the time of one ranking step goes: launches, the share of idle time, and the longest kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import cache
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.steps import Arms, Setting
from benchmarks.measure import Runner
from benchmarks.shapes import build, config_of

MOST_KERNELS = 20


def arms(setting: Setting) -> Arms:
    """One and six groups in a pass, with the settings that users get."""

    @cache
    def model() -> Any:
        return build(setting.shape, setting.device)

    return {
        f"{count} a pass": lambda count=count: profiled(setting, model(), count)  # type: ignore[misc]
        for count in ((1,) if setting.toy else (1, 6))
    }


def profiled(setting: Setting, model: Any, count: int) -> dict[str, Any]:
    """One step of `count` groups in one pass. Idle is the share of the step in which no kernel ran; launches slow the
    CPU down while they are recorded, so `seconds` is that of a step without the profiler."""
    cuda = setting.device == "cuda"
    groups = setting.workload.groups(count, config_of(setting.shape).vocab_size)
    runner = Runner(model, setting.device, [groups], checkpointing=True, equal_lengths=False)
    step = runner.prepared("ours-auto")
    step()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
    microseconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in recorded.events():
        if event.device_type == kind and not event.is_user_annotation:  # around kernels, such as the optimizer's step
            microseconds[event.name] += event.self_device_time_total if cuda else event.self_cpu_time_total
            launches[event.name] += 1
    busy = sum(microseconds.values()) / 1e6
    longest = sorted(microseconds, key=lambda name: -microseconds[name])[:MOST_KERNELS]
    return {
        "seconds": seconds,
        "launches": sum(launches.values()),
        "busy_seconds": busy,
        "idle_share": max(1 - busy / seconds, 0.0),
        "longest": [
            {"name": name[:160], "seconds": microseconds[name] / 1e6, "launches": launches[name]} for name in longest
        ],
    }
