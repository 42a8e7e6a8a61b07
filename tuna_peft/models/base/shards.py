"""Shards a frozen base that is too large for one GPU over processes, with FSDP2 (`fully_shard`).

Only the base is sharded. The adapters stay whole in every process and train data-parallel: they are less than 1 % of
the weights, and so a stack is extended, saved, resumed and hashed as on one GPU.

A layer's weights are gathered when it runs and freed afterwards, in all processes at once. When one process computes
alone (evaluation, sampling), the others have to gather along with it, see `SoloCompute`.

`tuna_peft.run.sharding` calls `shard_base`; `tuna_peft.run.processes` uses `SoloCompute`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

    The units of sharding are: each decoder layer; the input embedding, unless the head shares its weight; and the
    rest. 4-bit weights need a floating `bnb_4bit_quant_storage`.

    Args:
        model: A causal LM without adapters, the same in every process, usually on the CPU.
        mesh: A one-dimensional mesh over all processes.
        layers: Class names of the decoder layers; by default the model's `_no_split_modules`.
        reshard_after_forward: Free a layer's gathered weights between its forward and its backward pass.

    Raises:
        UserError: The model has no layers of these classes.
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
        # FSDP2 needs plain parameters; bitsandbytes finds the quantization state of a gathered one at its layer.
        codes = module.weight.data.as_subclass(torch.Tensor)
        module.weight = torch.nn.Parameter(codes, requires_grad=False)
    # From the inside out: each call takes the weights that no earlier call has taken.
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)  # the rest, with the head, stays gathered until the end of the backward pass
    for module in quantised:
        module.quant_state.to(model.device)
    if getattr(model, "hf_device_map", None):
        model.hf_device_map = {"": model.device}


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the base of `model` was sharded by `shard_base`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def keep_from_ddp(model: torch.nn.Module) -> None:
    """Makes DDP ignore the sharded weights: it would overwrite them in all processes with those of the first one."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class SoloCompute:
    """Lets the first process compute alone with a sharded model. Create it in every process.

    Args:
        group: All processes, over the CPU (gloo): a process that waits in NCCL keeps its GPU busy.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @contextlib.contextmanager
    def lead(self, model: torch.nn.Module) -> Iterator[None]:
        """For the first process: within it, every unit that gathers its weights makes the others gather too."""
        units = _resharded_units(model)
        hooks = [
            unit.register_forward_pre_hook(self._caller(number, *weight), prepend=True)
            for number, (unit, weight) in enumerate(zip(units, _a_weight_of_each(units), strict=True))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _resharded_units(model)
            self._send(_DONE)

    def follow(self, model: torch.nn.Module) -> None:
        """For the other processes: gathers the same units until the first process leaves `lead`."""
        units = _resharded_units(model)
        while (number := self._send(_DONE)) != _DONE:
            units[number].unshard()
            units[number].reshard()

    def _caller(self, number: int, module: torch.nn.Module, name: str) -> Callable[..., None]:
        def call(*_: Any) -> None:
            if isinstance(getattr(module, name), DTensor):  # else its unit is still gathered
                self._send(number)

        return call

    def _send(self, number: int) -> int:
        """The number that the first process broadcasts; `number` is ignored in the other ones."""
        received = torch.tensor(number)
        dist.broadcast(received, src=0, group=self._group)
        return int(received)


def _resharded_units(model: torch.nn.Module) -> list[Any]:
    """The units of sharding, in the same order in all processes, after freeing their gathered weights."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    return units


def _a_weight_of_each(units: Sequence[torch.nn.Module]) -> list[tuple[torch.nn.Module, str]]:
    """`(module, name)` of one weight of each unit; the unit is gathered when that weight is not a DTensor."""
    # Outer units come first, so a module ends up with the innermost unit that contains it.
    unit_of = {module: number for number, unit in enumerate(units) for module in unit.modules()}
    found: dict[int, tuple[torch.nn.Module, str]] = {}
    for module, number in unit_of.items():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                found.setdefault(number, (module, name))
    return [found[number] for number in range(len(units))]
