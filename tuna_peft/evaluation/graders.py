"""Programs that grade a response between 0 and 1."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from tuna_peft.errors import UserError

Grader = Callable[[dict[str, Any], str], float]

BUILTIN = {"builtin:pico": "tuna_peft.assets.pico_world.grader:grade"}


def load_grader(name: str) -> Grader:
    """The grader called `builtin:pico` or `module:function`; it takes a prompt's record and a response.

    Raises:
        UserError: No such module or function.
    """
    module, _, function = BUILTIN.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"no grader {name!r}: {error}",
            where="evaluation.grader",
            fix="Write it as `module:function`, importable from here, or use builtin:pico.",
        ) from error
