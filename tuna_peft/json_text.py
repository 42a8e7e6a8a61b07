"""Parses JSON that may come from anybody; whatever is wrong with it becomes one kind of error.

Stricter than `json.loads`: a key may not be given twice (the first value would be lost silently), and a number may not
have more digits than a float can hold.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError

MAX_DIGITS = 300
"""The largest float is about 1.8e308: below it, no integer overflows later."""


class Rejected(ValueError):
    """Text that is JSON, or too deep to tell, and cannot be used; the message says why."""


def parse_json(text: str | bytes) -> Any:
    """The value that `text` stands for.

    Raises:
        ValueError: It is not JSON (`json.JSONDecodeError`) or not UTF-8; or `Rejected`.
    """
    with _nesting_bounded():
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)


@contextlib.contextmanager
def _nesting_bounded() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise Rejected("the JSON is nested too deeply") from None


class Decoder(json.JSONDecoder):
    """For values one after the other in one text: `raw_decode` raises what `parse_json` raises."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_unique, parse_int=_integer)

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        with _nesting_bounded():
            return super().raw_decode(s, idx)


def read_json(file: str | Path, what: str = "JSON file", fix: str = "Copy it again, or make it again.") -> Any:
    """The value in a JSON file.

    Raises:
        UserError: The file cannot be read; the message calls it `what`.
    """
    try:
        return parse_json(Path(file).read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise UserError(f"not a valid {what}: {reason}", where=str(file), fix=fix) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise Rejected(f"the key `{twice}` is given twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Rejected(f"a number of {len(digits):,} digits")
    return int(digits)
