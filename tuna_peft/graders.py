"""Programs that grade a response between 0 and 1."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tuna_peft.errors import UserError

Grader = Callable[[dict[str, Any], str], float]

BUILTIN = {"builtin:pico": "tuna_peft.assets.pico_grader:grade"}


def load_grader(name: str, where: str) -> Grader:
    """The grader called `builtin:pico` or `module:function`; it takes a prompt's record and a response.

    The name is looked up, never evaluated: a module that Python can import, or that lies in the current folder, and a
    function that it defines.

    Args:
        name: As in a recipe.
        where: The key that it comes from, for the error.

    Raises:
        UserError: No such module or function.
    """
    module, _, function = BUILTIN.get(name, name).partition(":")
    if (here := os.getcwd()) not in sys.path:  # an installed command does not look there; last, so as to hide nothing
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise _no_grader(name, str(error), where) from error
    if not callable(found):
        raise _no_grader(name, f"{function} is no function", where)
    return found


def _no_grader(name: str, reason: str, where: str) -> UserError:
    return UserError(
        f"no grader {name!r}: {reason}",
        where=where,
        fix="Write it as `module:function`, importable from here, or use builtin:pico.",
    )
