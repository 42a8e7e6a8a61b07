"""The ranking step at full size: the released scheme, TRL's pairs and its tree rows, and ours."""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.gpu.steps import Arms, Setting
from benchmarks.ranking_step import measure
from benchmarks.shapes import build

# Name and groups a pass, by importance.
ORDER = (
    ("ours-auto", 1), ("reference", 1), ("trl-cpo", 1), ("ours-auto", 6), ("trl-dpo", 1), ("trl-tree", 1), ("ours", 1),
    ("ours-compiled", 6), ("ours-compiled", 1), ("ours-peft-lora", 1), ("trl-tree", 6), ("ours", 6),
)  # fmt: skip


def arms(setting: Setting) -> Arms:
    """Each arm over the same six groups of long-varied, with one and with six groups a pass."""

    @cache
    def model() -> Any:
        return build(setting.shape, setting.device)

    def run(name: str, together: int) -> dict[str, Any]:
        return measure(
            setting.workload, setting.device, setting.shape, [name], groups=2 if setting.toy else 6,
            groups_per_batch=together, repetitions=1 if setting.toy else 3, checkpointing=True, model=model(),
        )  # fmt: skip

    return {f"{name}, {together} a pass": lambda pair=(name, together): run(*pair) for name, together in ORDER}  # type: ignore[misc]
