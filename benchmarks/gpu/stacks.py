"""A ranking step with none, one and three frozen adapters below the trained one: fused layers and PEFT's."""

from __future__ import annotations

from typing import Any

from benchmarks.adapter_stack import ARMS
from benchmarks.gpu.steps import Arms, Setting
from benchmarks.measure import Runner
from benchmarks.shapes import build, config_of
from tuna_peft.models.base.memory import free_memory


def arms(setting: Setting) -> Arms:
    """By the number of adapters, the trained one included, and kind of layer."""
    built: dict[int, Runner] = {}

    def runner(adapters: int) -> Runner:
        if adapters in built:
            return built[adapters]
        built.clear()  # one model at a time
        free_memory()
        groups = setting.workload.groups(2, config_of(setting.shape).vocab_size)
        model = build(setting.shape, setting.device, frozen_adapters=adapters - 1)
        built[adapters] = Runner(
            model, setting.device, [[group] for group in groups], checkpointing=True, equal_lengths=False
        )
        return built[adapters]

    def run(adapters: int, arm: str) -> dict[str, Any]:
        runner(adapters).time(arm)  # warm-up
        return {"seconds": [runner(adapters).time(arm) for _ in range(1 if setting.toy else 4)]}

    return {
        f"{adapters} adapters, {kind}": lambda adapters=adapters, arm=arm: run(adapters, arm)  # type: ignore[misc]
        for adapters in (1, 2, 4)
        for kind, arm in ARMS.items()
    }
