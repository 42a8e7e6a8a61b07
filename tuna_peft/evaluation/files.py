"""Reads the files of a benchmark. Broken files and records are skipped, and the result lists them as excluded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.json_files import json_units, parse_line
from tuna_peft.data.ranked import Prompt
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.evaluation.results import Exclusion


class Skipped:
    """Collects what is skipped, by reason."""

    def __init__(self) -> None:
        self._by_reason: dict[str, Exclusion] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Records that `name` is skipped, or `count` items in it."""
        found = self._by_reason.setdefault(reason, Exclusion(reason, 0, []))
        found.count += count
        if len(found.names) < Exclusion.MOST_NAMES:
            found.names.append(name)

    def rendered(self, template: PromptTemplate, text: str, name: str) -> Prompt | None:
        """The prompt of a question; None, and `name` is skipped, where the template does not take it."""
        try:
            return template.render(text)
        except BadRow as error:
            self.add(error.what, name)
            return None

    def exclusions(self) -> list[Exclusion]:
        """One entry for each reason."""
        return list(self._by_reason.values())

    def __str__(self) -> str:
        """The reasons with up to three names each, for errors."""
        return "; ".join(f"{one.reason}: {', '.join(one.names[:3])}" for one in self.exclusions())


def read_object(file: Path, skipped: Skipped) -> dict[str, Any] | None:
    """The JSON object in `file`; None (and an entry in `skipped`) for a file without a readable object."""
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        skipped.add(f"the file cannot be read ({type(error).__name__})", file.name)
        return None
    if isinstance(value, dict):
        return value
    skipped.add("the file holds no JSON object", file.name)
    return None


def read_lines(file: Path, skipped: Skipped) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; other lines are added to `skipped`.

    Raises:
        UserError: The file does not exist, is empty or is not text.
    """
    kind, units = json_units(file)
    records = []
    for number, unit, _ in units:
        name = f"{file.name}: {kind} {number}"
        try:
            value = parse_line(file, number, unit, last=False) if isinstance(unit, str) else unit
        except UserError:
            skipped.add("the line is no JSON", name)
            continue
        if isinstance(value, dict):
            records.append(value)
        else:
            skipped.add("the line is no JSON object", name)
    return records


def require_benchmark(path: Path, name: str) -> None:
    """UserError if there is nothing at `path`; says how to get the benchmark called `name`."""
    if not path.exists():
        raise UserError("there is no such file or folder", where=str(path), fix=how_to_fetch(name))


def how_to_fetch(name: str) -> str:
    """A sentence with the command."""
    return f"`tuna-peft benchmarks fetch {name}` downloads this benchmark."
