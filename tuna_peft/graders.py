"""Loads Python functions that grade a response, for the task `graded` and for function judges."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from tuna_peft.errors import UserError

Grader = Callable[[dict[str, Any], str], float]

BUILTIN = {
    "builtin:pico": "tuna_peft.assets.pico_grader:grade",
    "builtin:references": "tuna_peft.evaluation.reference_grade:grade",
}


def load_grader(name: str, where: str) -> Grader:
    """Imports a grader, one of `BUILTIN` or `module:function`; it takes a prompt's record and a response.

    Importing runs the module's code. The module can be installed or in the current folder.

    Args:
        name: The name in the recipe.
        where: The key of the recipe, for the error.

    Returns:
        A function `(record, response) -> float`, by convention between 0 and 1, higher is better.

    Raises:
        UserError: There is no such module or function.
    """
    module, _, function = BUILTIN.get(name, name).partition(":")
    _search_current_folder()
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise _no_grader(name, str(error), where) from error
    if not callable(found):
        raise _no_grader(name, f"{function} is not a function", where)
    return found


def require_module(name: str, where: str) -> None:
    """Checks that the module of a grader exists, without running any of its code; for arguments see `load_grader`.

    Raises:
        UserError: There is no such module.
    """
    top = BUILTIN.get(name, name).partition(":")[0].partition(".")[0]
    _search_current_folder()
    if importlib.util.find_spec(top) is None:
        raise _no_grader(name, f"no module named {top!r}", where)


def _search_current_folder() -> None:
    # The installed command does not search the current folder. Last, so that its files hide no installed module.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def _no_grader(name: str, reason: str, where: str) -> UserError:
    return UserError(
        f"no grader {name!r}: {reason}",
        where=where,
        fix="Write `module:function` with an installed module or one in the current folder, or use one of "
        f"{', '.join(BUILTIN)}.",
    )
