"""The error class for mistakes that a user can fix. The whole package raises it, and the command line prints it."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """An error that the user can fix; the message says what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with code 2.

    Args:
        what: What is wrong, in one sentence.
        where: The place: file, line or row, candidate, key.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}\n  {fix}" if fix else message)

    def __reduce__(self) -> Any:  # so that it can be sent to another process
        return functools.partial(type(self), where=self.where, fix=self.fix), (self.what,)


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, shortened; its type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


_MOST_COMPARED = 1000  # a file with 60,000 columns would take half a minute


def did_you_mean(name: str, valid: Iterable[str], most: int = 20) -> str:
    """`Did you mean ...?` with the most similar of `valid`; if none is similar, a list of the first `most` of them."""
    options = list(itertools.islice(valid, _MOST_COMPARED))
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"Valid here: {listed(options, most)}."


def listed(names: Iterable[str], most: int = 20) -> str:
    """The first `most` names with commas between them, and `...` if there are more."""
    first = list(itertools.islice(names, most + 1))
    return ", ".join(first[:most]) + (", ..." if len(first) > most else "")
