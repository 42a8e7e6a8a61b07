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

from tuna_peft.errors import UserError

# Others wait for as long as the first one evaluates or merges: much longer than the ten minutes of a usual collective.
_PATIENCE = timedelta(days=2)


class Processes:
    """This process among those of the run.

    Args:
        on_cpu: Compute on the CPU, as the run does.

    Attributes:
        count: How many there are.
        main: Whether this is the first.

    Raises:
        UserError: The launcher would shard the model, or steps, in a way that a run does not support.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        _require_whole_models()
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


def _require_whole_models() -> None:
    """Refuses FSDP and DeepSpeed.

    Sharded weights cannot be evaluated or saved by one process alone, and DeepSpeed counts backward passes to know
    when a step ends, while `max_tokens_per_batch` and a step that runs out of memory change their number.
    """
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false") == "true":
            raise UserError(
                f"a run does not work under {name} yet",
                where="--launch",
                fix="Use data parallelism (`--launch ddp`): each GPU holds the whole 4-bit base, and "
                "`tuna-peft plan RECIPE --gpu all` shows which cards do.",
            )


def world_size() -> int:
    """Processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
