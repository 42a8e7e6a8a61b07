"""Splits generation and scoring over the processes of a run when each of them has the whole model.

The first process leads: it alone knows the journals and the tasks. What it computes through `split` is divided into
units (a block of prompts, a batch of rows), which are computed in rounds, one unit in each process. The results come
back in the order of the units, and a unit is computed as it would be in a single process, so all results, and the
journals that they are written to, are those of a single process. If the run is killed, the results of the other
processes in that round are lost.

`stream_responses` and `stream_logps` call `split`; `tuna_peft.run.processes` calls `lead` and `follow`.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from tuna_peft.errors import UserError
from tuna_peft.models.base.memory import free_memory

Loaded = TypeVar("Loaded", bound="HasModel")
Work = Callable[..., AbstractContextManager[Callable[[Any], Iterator[Any]]]]
"""Prepares a model with some options, and yields a function that computes the results of one unit. It is a function at
the top of a module, so that it can be sent to other processes, as can its options, units and results."""


class HasModel(Protocol):
    """What a model is loaded as, such as an `AdapterStack`."""

    model: Any


_leading: Workers | None = None


def split(model: torch.nn.Module, work: Work, units: Iterable[Any], **options: Any) -> Iterator[Any]:
    """The results of all units, in the order of the units.

    Args:
        model: If the other processes have it too (see `Workers.lead` and `load_for_all`), they compute a part.
        work: See `Work`; it is called with the model and the options.
        units: What to compute.

    Raises:
        UserError: What `work` raises, in this or in another process.
    """
    if _leading is not None and model in _leading.models:
        yield from _leading.split(model, work, iter(units), options)
    else:
        with work(model, **options) as compute:
            for unit in units:
                yield from compute(unit)


def load_for_all(load: Callable[[], Loaded]) -> Loaded:
    """Calls `load`, and has the other processes call it too as soon as they compute a part with this model.

    Args:
        load: Returns an object with an attribute `model`; can be pickled.
    """
    loaded = load()
    if _leading is not None:
        _leading.models[loaded.model] = pickle.dumps(load)
    return loaded


class Workers:
    """The processes of a run as one that leads and others that compute what it sends them.

    Args:
        group: All processes, over the CPU (gloo): a process that waits in NCCL keeps its GPU busy.

    Attributes:
        models: In the first process, while it leads: the models that the others have too, with the pickled function
            that loads them; None for the model of the run.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._count = group, dist.get_world_size(group)
        self.models: WeakKeyDictionary[torch.nn.Module, bytes | None] = WeakKeyDictionary()

    @contextlib.contextmanager
    def lead(self, model: torch.nn.Module) -> Iterator[None]:
        """For the first process: within it, `split` divides work with `model` among all processes.

        Args:
            model: The same in all processes, with the same active adapters.
        """
        global _leading
        self.models[model] = None
        _leading = self
        try:
            yield
            # Not after an error: this process ends then, and the others may wait for something else.
            self._send([None] * self._count)
        finally:
            _leading = None
            self.models.clear()

    @torch.no_grad()
    def follow(self, model: torch.nn.Module) -> None:
        """For the other processes: computes what it is sent until the first process leaves `lead`."""
        loaded: tuple[bytes, Any] | None = None
        while (task := self._receive()) is not None:
            source, work, options = task
            if source is not None and (loaded is None or loaded[0] != source):
                loaded = None  # its memory, before the next one is loaded
                loaded = (source, pickle.loads(source)())
            with work(model if loaded is None or source is None else loaded[1].model, **options) as compute:
                while (units := self._receive()) is not None:
                    try:
                        self._gather([result for unit in units for result in compute(unit)])
                    except UserError as error:
                        self._gather(error)
        if loaded is not None:
            loaded = None
            free_memory()

    def split(
        self, model: torch.nn.Module, work: Work, units: Iterator[Any], options: dict[str, Any]
    ) -> Iterator[Any]:
        """See the function `split`."""
        self._send([(self.models[model], work, options)] * self._count)
        with work(model, **options) as compute:
            while chosen := list(itertools.islice(units, self._count)):
                self._send([chosen[i : i + 1] for i in range(self._count)])  # none at the end for some processes
                yield from compute(chosen[0])
                for results in self._gather([]):
                    if isinstance(results, UserError):
                        raise results
                    yield from results
        self._send([None] * self._count)

    def _send(self, each: list[Any]) -> None:
        dist.scatter_object_list([None], each, src=0, group=self._group)

    def _receive(self) -> Any:
        received: list[Any] = [None]
        dist.scatter_object_list(received, None, src=0, group=self._group)
        return received[0]

    def _gather(self, results: list[Any] | UserError) -> list[Any]:
        """In the first process: what each process has passed."""
        gathered: list[Any] | None = [None] * self._count if dist.get_rank(self._group) == 0 else None
        dist.gather_object(results, gathered, dst=0, group=self._group)
        return gathered or []
