"""Error messages for recipes: plain words for pydantic's errors, collected so that one command lists all mistakes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuna_peft.errors import UserError

_KINDS = ((int, "an integer"), (float, "a number"), (str, "text"), (dict, "a mapping"), (list, "a list"))
_PLAINER = {
    "a valid string": "text",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid dictionary": "a mapping of keys",
    "a valid list": "a list",
    "None": "null",
}


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Args:
        where: `file:line`, or the override that caused it.
        key: The dotted key, with stages by name.
        what: What is wrong and what was expected.
        fix: The most similar valid key, or another fix.
    """

    where: str
    key: str
    what: str
    fix: str | None = None

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        return f"{place}: {self.what}" + (f" {self.fix}" if self.fix else "")


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one `UserError` that lists all problems in the order of the file; returns if there are none."""
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


def expected(errors: Sequence[Any], value: Any) -> str:
    """One sentence for all errors about one value; the alternatives of a union are joined with "or"."""
    messages = list(dict.fromkeys(_message(error) for error in errors))
    wishes = [message.removeprefix("expected ") for message in messages if message.startswith("expected ")]
    others = [message for message in messages if not message.startswith("expected ")]
    if not wishes:
        return " ".join(others)
    return " ".join([*others, f"expected {' or '.join(wishes)}, found {found(value)}."])


def found(value: Any) -> str:
    """A value and its type for a message, shortened: `'abc' (text)`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kind = next((name for type_, name in _KINDS if isinstance(value, type_)), type(value).__name__)
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({kind})"


def _message(error: Any) -> str:
    text = str(error["msg"])
    if error["type"] in ("value_error", "assertion_error"):
        return _ended(text.partition(", ")[2])
    if error["type"] == "string_pattern_mismatch":
        return f"expected text that matches {error['ctx']['pattern']}"
    if error["type"] == "too_short":
        return "expected at least one entry"
    if error["type"] == "model_type":
        return "expected a mapping of keys"
    if text.startswith("Input should be "):
        wish = text.removeprefix("Input should be ")
        if wish.startswith(("greater", "less")):
            wish = f"a number {wish}"
        for long in sorted(_PLAINER, key=len, reverse=True):
            if wish.startswith(long):
                wish = _PLAINER[long] + wish.removeprefix(long)
                break
        return f"expected {wish}"
    return _ended(text)


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
