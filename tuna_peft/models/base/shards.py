"""A frozen base that no single GPU holds, sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Only the base is sharded. The adapters that come on top of it stay whole in every process and train data-parallel: they
are under a hundredth of the weights, and this way a stack is pushed, saved, resumed and fingerprinted as on one GPU.

A layer's weights are gathered when it runs and let go after it, on all processes at once. Where one process alone
computes (evaluation, sampling) the others therefore gather along with it, see `one_computes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tuna_peft.errors import UserError

_DONE = -1


def shard_base(
    model: Any, mesh: DeviceMesh, *, layers: Sequence[str] | None = None, reshard_after_forward: bool = True
) -> None:
    """Shards a frozen base in place; each process keeps its part of every weight on its device.

    A unit of sharding is a decoder layer, the input embedding where the head has its own weight, and the rest. 4-bit
    weights need a floating `bnb_4bit_quant_storage`.

    Args:
        model: A causal LM without adapters, the same in every process, usually on the CPU.
        mesh: Of one dimension, over all processes.
        layers: Class names of the layers; by default what the model says must not be split.
        reshard_after_forward: Let a layer's weights go between its forward and its backward pass.

    Raises:
        UserError: The model has no such layers.
    """
    wanted = set(layers or model._no_split_modules or ())
    units = [module for module in model.modules() if type(module).__name__ in wanted]
    if not units:
        raise UserError(
            f"{model.config.model_type} has no layers called {', '.join(sorted(wanted)) or '(unknown)'} to shard",
            fix="Name its layer class as fsdp_transformer_layer_cls_to_wrap in the accelerate configuration.",
        )
    embedding = model.get_input_embeddings()
    if embedding.weight is not model.get_output_embeddings().weight:
        units.append(embedding)
    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in quantised:
        # As plain parameters: bitsandbytes finds the state of a gathered one at its layer.
        codes = module.weight.data.as_subclass(torch.Tensor)
        module.weight = torch.nn.Parameter(codes, requires_grad=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)  # the rest, head included, stays gathered until the end of a backward pass
    for module in quantised:
        module.quant_state.to(model.device)
    if getattr(model, "hf_device_map", None):
        model.hf_device_map = {"": model.device}


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard_base` has been at the base of `model`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def keep_from_ddp(model: torch.nn.Module) -> None:
    """Tells data parallelism to leave the shards alone: it would send the first process's to all others."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class Lending:
    """Lets the first process compute alone with a sharded model; make it in every process.

    Args:
        patience: How long the others wait for the first one's next step.
    """

    def __init__(self, patience: timedelta) -> None:
        # By way of the CPU: waiting in a collective of the GPU would keep it busy.
        self._group = dist.new_group(backend="gloo", timeout=patience)

    @contextlib.contextmanager
    def borrow(self, model: torch.nn.Module) -> Iterator[None]:
        """In the first process: inside, every unit that gathers its weights calls the others to gather too."""
        units = _units_apart(model)
        hooks = [
            unit.register_forward_pre_hook(self._caller(number, *weight), prepend=True)
            for number, (unit, weight) in enumerate(zip(units, _a_weight_of_each(units), strict=True))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _units_apart(model)
            self._send(_DONE)

    def lend(self, model: torch.nn.Module) -> None:
        """In the others: gathers along until the first process is done."""
        units = _units_apart(model)
        while (number := self._send(_DONE)) != _DONE:
            units[number].unshard()
            units[number].reshard()

    def _caller(self, number: int, module: torch.nn.Module, name: str) -> Callable[..., None]:
        def call(*_: Any) -> None:
            if isinstance(getattr(module, name), DTensor):  # else its unit is gathered still
                self._send(number)

        return call

    def _send(self, number: int) -> int:
        """What the first process says; the others' own is ignored."""
        said = torch.tensor(number)
        dist.broadcast(said, src=0, group=self._group)
        return int(said)


def _units_apart(model: torch.nn.Module) -> list[Any]:
    """The units of sharding, in the same order everywhere, each process with its part alone."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    return units


def _a_weight_of_each(units: Sequence[torch.nn.Module]) -> list[tuple[torch.nn.Module, str]]:
    """A module and the name of its weight for each unit, to see whether that is gathered: then it is no DTensor."""
    # An outer unit comes before those inside it, which take their modules from it.
    unit_of = {module: number for number, unit in enumerate(units) for module in unit.modules()}
    found: dict[int, tuple[torch.nn.Module, str]] = {}
    for module, number in unit_of.items():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                found.setdefault(number, (module, name))
    return [found[number] for number in range(len(units))]
