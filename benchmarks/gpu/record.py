"""The file of results: `{"environment": {...}, "steps": {step: {arm: {...}}}}`, written after every arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuna_peft.files import write_json

ERROR = "error"  # an arm that failed, or did not end, has only this key


class Record:
    """Results in `folder/gpu.json`. Each method reads the file again, because the steps are other processes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "gpu.json"

    def read(self) -> dict[str, Any]:
        """The whole file."""
        return json.loads(self.file.read_text("utf-8")) if self.file.exists() else {"environment": {}, "steps": {}}

    def arms(self, step: str) -> dict[str, Any]:
        """The results of a step so far, by arm."""
        return self.read()["steps"].get(step, {})

    def put(self, step: str, arm: str, result: dict[str, Any]) -> None:
        """Writes the result of an arm. ValueError, and the file as it was, if a number is NaN or infinite."""
        found = self.read()
        found["steps"].setdefault(step, {})[arm] = result
        write_json(self.file, found)

    def environment(self, values: dict[str, Any]) -> None:
        """Writes what all results depend on."""
        write_json(self.file, self.read() | {"environment": values})

    def forget(self, step: str, *, failures_only: bool) -> None:
        """Removes the results of a step, or those that are errors."""
        found = self.read()
        arms = found["steps"].pop(step, {})
        if kept := {name: arm for name, arm in arms.items() if failures_only and ERROR not in arm}:
            found["steps"][step] = kept
        write_json(self.file, found)
