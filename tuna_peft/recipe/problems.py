"""What is wrong with a recipe, collected so that one run of the command shows all of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Args:
        where: `file:line`, or the override that brought it.
        key: The dotted key, stages by name.
        what: What is wrong and what was expected.
        fix: The nearest valid key or another remedy.
    """

    where: str
    key: str
    what: str
    fix: str | None = None

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        return f"{place}: {self.what}" + (f" {self.fix}" if self.fix else "")


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one `UserError` that lists them all, in the order of the file; does nothing when there are none."""
    if len(problems) == 1:
        only = problems[0]
        where = f"{only.where}: {only.key}" if only.key else only.where
        raise UserError(only.what, where=where, fix=only.fix)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems, key=_line))
        raise UserError(f"the recipe has {len(problems)} mistakes:{listed}")


def _line(problem: Problem) -> int:
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else sys.maxsize  # overrides come last
