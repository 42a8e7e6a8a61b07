"""The processes of one run, as `accelerate launch` and `torchrun` start them.

All processes train, each on its own copy of the base or, under FSDP2, on one base that they share. Only the first
process writes to the run's folder, evaluates and exports; the others wait meanwhile. `tuna_peft.run.pipeline` creates
one `Processes` at the start of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from accelerate import PartialState

from tuna_peft.models.base.shards import SoloCompute
from tuna_peft.run.sharding import Sharding, requested_deepspeed, requested_sharding, world_size

# The others wait while the first process evaluates or merges, longer than PyTorch's default of ten minutes.
_TIMEOUT = timedelta(days=2)


class Processes:
    """This process and its place among all processes of the run.

    Args:
        on_cpu: Whether the run computes on the CPU.

    Attributes:
        count: Number of processes.
        main: Whether this is the first process.
        sharding: How the processes share one base; None if each has its own copy.

    Raises:
        UserError: The launcher's configuration requests sharding that a run does not support.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        sharding = requested_sharding()
        # Accelerate 1.15 ignores DeepSpeed if it is told to use the CPU: it is told which backend to use instead.
        options: dict[str, Any] = {"backend": "gloo"} if requested_deepspeed(on_cpu) and on_cpu else {"cpu": on_cpu}
        # A single process needs no process group, which would outlive the run.
        self._state = PartialState(timeout=_TIMEOUT, **options) if world_size() > 1 else None
        self.count = self._state.num_processes if self._state else 1
        self.main = self._state is None or self._state.is_main_process
        self.sharding: Sharding | None = sharding if self._state else None
        self._solo = SoloCompute(_TIMEOUT) if self.sharding else None

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        if self._state:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self, model: Any = None) -> Iterator[None]:
        """The first process runs the block while the others wait; then they run it, and find its results.

        Args:
            model: The model that the first process uses in the block. If it is sharded, the waiting processes take
                part in gathering its weights.
        """
        solo = self._solo if model is not None else None
        if self.main:
            with solo.lead(model) if solo else contextlib.nullcontext():
                yield
            self.wait()
        else:
            if solo:
                solo.follow(model)
            self.wait()
            yield

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The processes run the block one after the other."""
        rank = self._state.process_index if self._state else 0
        for _ in range(rank):
            self.wait()
        yield
        for _ in range(rank, self.count):
            self.wait()
