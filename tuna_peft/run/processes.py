"""Several processes on one run, as `accelerate launch` and `torchrun` start them: one of them writes.

Every process trains, on a base of its own or, under FSDP2, on one that all share; the first process alone owns the
run's folder, evaluates and exports, while the others wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from accelerate import PartialState

from tuna_peft.models.base.shards import Lending
from tuna_peft.run.sharding import Sharding, asked_for_deepspeed, asked_for_sharding, world_size

# Others wait for as long as the first one evaluates or merges: much longer than the ten minutes of a usual collective.
_PATIENCE = timedelta(days=2)


class Processes:
    """This process among those of the run.

    Args:
        on_cpu: Compute on the CPU, as the run does.

    Attributes:
        count: How many there are.
        main: Whether this is the first.
        sharding: How they share one base; None where each has its own.

    Raises:
        UserError: The launcher would shard or step in a way that a run does not support.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        asked = asked_for_sharding()
        # DeepSpeed's engine on a CPU is one on no GPU.
        options: dict[str, Any] = {"backend": "gloo"} if asked_for_deepspeed(on_cpu) and on_cpu else {"cpu": on_cpu}
        # A single process needs no group, and nothing that would outlive the run.
        self._state = PartialState(timeout=_PATIENCE, **options) if world_size() > 1 else None
        self.count = self._state.num_processes if self._state else 1
        self.main = self._state is None or self._state.is_main_process
        self.sharding: Sharding | None = asked if self._state else None
        self._lending = Lending(_PATIENCE) if self.sharding else None

    def wait(self) -> None:
        """Until all have come to this point."""
        if self._state:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self, model: Any = None) -> Iterator[None]:
        """The first process does what is inside while the others wait; then they do it, with what it made.

        Args:
            model: What the first one computes with; if it is sharded, the others gather its weights along with it.
        """
        lending = self._lending if model is not None else None
        if self.main:
            with lending.borrow(model) if lending else contextlib.nullcontext():
                yield
            self.wait()
        else:
            if lending:
                lending.lend(model)
            self.wait()
            yield

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process after the other does what is inside."""
        rank = self._state.process_index if self._state else 0
        for _ in range(rank):
            self.wait()
        yield
        for _ in range(rank, self.count):
            self.wait()
