"""Several processes on one run, as `accelerate launch` and `torchrun` start them: one of them writes.

Every process holds the model and trains; the first one alone owns the run's folder, evaluates and exports, while the
others wait.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from accelerate import PartialState

# Others wait for as long as the first one evaluates or merges: much longer than the ten minutes of a usual collective.
_PATIENCE = timedelta(days=2)


class Processes:
    """This process among those of the run.

    Args:
        on_cpu: Compute on the CPU, as the run does.

    Attributes:
        count: How many there are.
        main: Whether this is the first.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        # A single process needs no group, and nothing that would outlive the run.
        self._state = PartialState(cpu=on_cpu, timeout=_PATIENCE) if world_size() > 1 else None
        self.count = self._state.num_processes if self._state else 1
        self.main = self._state is None or self._state.is_main_process

    def wait(self) -> None:
        """Until all have come to this point."""
        if self._state:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process does what is inside while the others wait; then they do it, with what it downloaded."""
        with self._state.main_process_first() if self._state else contextlib.nullcontext():
            yield


def world_size() -> int:
    """Processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first of the launched processes; needs no group."""
    return int(os.environ.get("RANK", "0")) == 0
