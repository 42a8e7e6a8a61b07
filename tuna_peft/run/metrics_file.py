"""`metrics.jsonl` in a run's folder: what the trainers log, one line for each logged step of each stage."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tuna_peft.files import write_text

METRICS = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends each entry of the log history when it is logged.

    A resumed stage repeats the steps after its checkpoint, and power may fail before a line reaches the disk: when a
    stage begins and when it ends, its lines are made those of the history.

    Args:
        path: The file.
        stage: The name of the stage, the first value of its lines.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._restore(state.log_history)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._line(state.log_history[-1]))

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._restore(state.log_history)

    def _restore(self, history: Sequence[dict[str, Any]]) -> None:
        before = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        others = [line for line in before.splitlines(keepends=True) if self._is_of_another_stage(line)]
        text = "".join([*others, *map(self._line, history)])
        if text != before or history:
            write_text(self.path, text)

    def _line(self, entry: dict[str, Any]) -> str:
        return json.dumps({"stage": self.stage, **finite(entry)}, ensure_ascii=False, allow_nan=False) + "\n"

    def _is_of_another_stage(self, line: str) -> bool:
        try:
            return bool(json.loads(line)["stage"] != self.stage)
        except (ValueError, TypeError, KeyError):  # a line that was cut off when the process was killed
            return False


def finite(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with null for numbers that JSON does not have, such as the gradient norm of a step that overflowed."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
