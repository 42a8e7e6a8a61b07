"""The checks of `tuna-peft doctor`."""

from __future__ import annotations

import dataclasses

from benchmarks.gpu.steps import Arms, Setting
from tuna_peft.cli.checks import run_checks


def arms(setting: Setting) -> Arms:
    """One arm: all checks."""
    return {"checks": lambda: {"checks": [dataclasses.asdict(check) for check in run_checks()]}}
