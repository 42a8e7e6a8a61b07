"""The steps in order of importance, and the process in which one step measures its arms.

A step is a module with `arms(setting)`, which returns a function for each arm by its name. A function returns JSON
values. Models that several arms share are built by the first of them.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.record import ERROR, Record
from benchmarks.workloads import WORKLOADS, Workload

Arms = dict[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Setting:
    """What a step measures.

    Attributes:
        shape: Name of the model's shape, see `benchmarks.shapes`.
        device: `cuda`, or `cpu` for a trial.
        toy: Whether numbers of tokens and repetitions are as small as they can be.
    """

    shape: str
    device: str
    toy: bool

    @property
    def workload(self) -> Workload:
        """The data. In a trial, rows are just long enough for attention by segment."""
        return Workload("toy", 64, mean=96) if self.toy else WORKLOADS["long-varied"]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Its name in the file of results.
        seconds: Its time limit when the whole command has ten minutes.
        module: Name of its module in this folder.
        shape: Its shape, unless this is a trial.
    """

    name: str
    seconds: float
    module: str
    shape: str = "8b"


STEPS = {
    step.name: step
    for step in (
        Step("doctor", 60, "doctor"),
        Step("kernel", 60, "kernel"),
        Step("gradients", 60, "gradients", "small"),
        Step("ranking-7b", 150, "ranking", "7b"),
        Step("ranking-8b", 120, "ranking"),
        Step("trainer", 120, "trainer"),
        Step("decoding", 90, "decoding"),
        Step("stacks", 60, "stacks"),
        Step("profile", 45, "profile"),
    )
}


def measure(name: str, record: Record, *, toy: bool) -> int:
    """Measures all arms of a step that are not in the record, in this process.

    An arm is recorded as an error before it starts, so that one which ends the process is known.

    Returns:
        0, or 1 when the device can no longer be used in this process.
    """
    import torch

    from benchmarks.ranking_step import environment
    from tuna_peft.models.base.memory import free_memory

    step = STEPS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record.environment(environment(device))
    arms: Arms = importlib.import_module(f"benchmarks.gpu.{step.module}").arms(
        Setting("tiny" if toy else step.shape, device, toy)
    )
    for arm, run in arms.items():
        if arm in record.arms(name):
            continue
        record.put(name, arm, {ERROR: "the process ended, or its time was up"})
        started = time.perf_counter()
        try:
            result = run()
            record.put(name, arm, {**result, "taken": round(time.perf_counter() - started, 2)})
            print(f"{name}: {arm}: {time.perf_counter() - started:.1f} s", flush=True)
        except Exception as error:  # whatever it is, the other arms are measured
            record.put(name, arm, {ERROR: traceback.format_exc()[-4000:]})
            print(f"{name}: {arm}: {type(error).__name__}: {error}", flush=True)
            if "CUDA error" in str(error):  # after one, every call fails
                return 1
        free_memory()
    return 0
