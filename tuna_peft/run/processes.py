"""The processes of one run, as `accelerate launch` and `torchrun` start them.

All processes train, each on its own copy of the base or, under FSDP2, on one base that they share. Only the first
process writes to the run's folder and exports. Where it generates or scores, the others compute a part
(`tuna_peft.models.workers`), or gather their shards. `tuna_peft.run.pipeline` creates one `Processes` at the start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from tuna_peft.errors import UserError, first_line
from tuna_peft.models.base.shards import SoloCompute
from tuna_peft.models.workers import Workers
from tuna_peft.run.sharding import Sharding, requested_deepspeed, requested_sharding, world_size

# The others wait while the first process merges or asks a server, longer than PyTorch's default of ten minutes.
_TIMEOUT = timedelta(days=2)
# Until all processes are there, and for a step of training: a machine whose command has failed never comes.
_CONNECT = timedelta(minutes=30)


class Processes:
    """This process and its place among all processes of the run.

    Args:
        on_cpu: Whether the run computes on the CPU.

    Attributes:
        count: Number of processes.
        machines: Number of machines.
        main: Whether this is the first process.
        first_of_machine: Whether this is the first process of its machine.
        sharding: How the processes share one base; None if each has its own copy.

    Raises:
        UserError: The launcher's configuration requests sharding that a run does not support, or some processes have
            not connected within half an hour.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        sharding = requested_sharding()
        # Accelerate 1.15 ignores DeepSpeed if it is told to use the CPU: it is told which backend to use instead.
        options: dict[str, Any] = {"backend": "gloo"} if requested_deepspeed(on_cpu) and on_cpu else {"cpu": on_cpu}
        # A single process needs no process group, which would outlive the run.
        try:
            self._state = PartialState(timeout=_CONNECT, **options) if world_size() > 1 else None
        except dist.DistError as error:
            raise UserError(
                f"not all {world_size()} processes have connected within {_CONNECT}: {first_line(error)}",
                fix="See the output of the other machines; give them the same command, address and port.",
            ) from error
        self.count = self._state.num_processes if self._state else 1
        self.machines = self.count // int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        self.main = self._state is None or self._state.is_main_process
        self.first_of_machine = self._state is None or self._state.is_local_main_process
        self.sharding: Sharding | None = sharding if self._state else None
        self._helpers: SoloCompute | Workers | None = None
        if self._state:
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            self._helpers = SoloCompute(self._group) if self.sharding else Workers(self._group)

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        if self._state:
            dist.barrier(group=self._group)

    def of_all(self, value: Any) -> list[Any]:
        """What each process has passed, in the order of the processes."""
        values: list[Any] = [value] * self.count
        if self._state:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def of_main(self, value: Any = None) -> Any:
        """What the first process has passed."""
        values = [value]
        if self._state:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    @contextlib.contextmanager
    def end_together(self) -> Iterator[None]:
        """Turns the error of a process that waits for one that has ended into a UserError."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(text in str(error) for text in ("gloo/", "NCCL"))
            if self.count == 1 or not lost:
                raise
            raise UserError(
                "another process of this run has ended, or its machine cannot be reached",
                fix="Its own output says why. Give the same commands again on all machines to resume the run.",
            ) from error

    @contextlib.contextmanager
    def main_first(self, model: Any = None) -> Iterator[None]:
        """The first process runs the block while the others wait; then they run it, and find its results.

        Args:
            model: The model of the run if the first process computes with it in the block: the waiting processes then
                compute a part or, if it is sharded, take part in gathering its weights.
        """
        helpers = self._helpers if model is not None else None
        if self.main:
            with helpers.lead(model) if helpers else contextlib.nullcontext():
                yield
            self.wait()
        else:
            if helpers:
                helpers.follow(model)
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
