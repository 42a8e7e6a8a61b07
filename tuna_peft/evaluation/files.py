"""Reading a benchmark's files as far as they can be read: what is broken is named and left out."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuna_peft.data.json_files import parse_line, read_json_units
from tuna_peft.errors import UserError
from tuna_peft.evaluation.results import Exclusion


class LeftOut:
    """Collects what is left out, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Notes that `name` is left out, or `count` things in it."""
        self._names[reason].append(name)
        self._counts[reason] += count

    def exclusions(self) -> list[Exclusion]:
        """One entry for each reason."""
        return [
            replace(Exclusion.of(reason, names), count=self._counts[reason]) for reason, names in self._names.items()
        ]


def read_object(file: Path, left_out: LeftOut) -> dict[str, Any] | None:
    """The JSON object in `file`; None for a file that cannot be read, or holds something else, which is noted."""
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        left_out.add(f"the file cannot be read ({type(error).__name__})", file.name)
        return None
    if isinstance(value, dict):
        return value
    left_out.add("the file holds no JSON object", file.name)
    return None


def read_lines(file: Path, left_out: LeftOut) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; lines that are no object are noted.

    Raises:
        UserError: There is no such file, or it is empty or no text.
    """
    try:
        kind, units = read_json_units(file)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=str(file)) from error
    records = []
    for number, unit in units:
        name = f"{file.name}: {kind} {number}"
        try:
            value = parse_line(file, number, unit, last=False) if isinstance(unit, str) else unit
        except UserError:
            left_out.add("the line is no JSON", name)
            continue
        if isinstance(value, dict):
            records.append(value)
        else:
            left_out.add("the line is no JSON object", name)
    return records
