"""Pydantic's errors in the words of a recipe: what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def expected(errors: Sequence[Any], value: Any) -> str:
    """One sentence for the errors about one value; a union gives one error per alternative, joined by "or"."""
    messages = list(dict.fromkeys(_message(error) for error in errors))
    wishes = [message.removeprefix("expected ") for message in messages if message.startswith("expected ")]
    others = [message for message in messages if not message.startswith("expected ")]
    if not wishes:
        return " ".join(others)
    return " ".join([*others, f"expected {' or '.join(wishes)}, found {found(value)}."])


def found(value: Any) -> str:
    """`'abc' (text)`, shortened."""
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
