"""The sharding that an accelerate configuration requests, and which of it a run supports.

`tuna_peft.run.processes` reads it at the start of a run; `tuna-peft run --launch` checks the file before that. A run
shards its base itself (`tuna_peft.models.base.shards`): accelerate's FSDP and DeepSpeed's ZeRO-3 would shard the
adapters of each stage along with the base, and could not undo that for the next stage or for an evaluation. ZeRO-1 and
ZeRO-2 split only gradients and optimizer states; with them DeepSpeed's own engine trains each stage.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available

from tuna_peft.errors import UserError
from tuna_peft.recipe.schema import Recipe


@dataclass(frozen=True)
class Sharding:
    """The settings of accelerate's `fsdp_config` that a run follows.

    Attributes:
        layers: Class names of the layers to shard (`fsdp_transformer_layer_cls_to_wrap`); None is the model's default.
        reshard_after_forward: Free the gathered weights of a layer between its forward and its backward pass
            (`fsdp_reshard_after_forward`).
        in_turn: Load the base in one process after the other, so that RAM holds one whole base at a time
            (`fsdp_cpu_ram_efficient_loading`).
    """

    layers: list[str] | None
    reshard_after_forward: bool
    in_turn: bool


def requested_sharding() -> Sharding | None:
    """The FSDP2 settings that `accelerate launch` put into the environment; None without FSDP.

    Removes the request from the environment: the run shards the base itself, and accelerate's trainers must see plain
    data parallelism.

    Raises:
        UserError: FSDP settings that a run does not support.
    """
    if not _is_true("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise _unsupported("FSDP 1", "Set fsdp_version: 2 in the accelerate configuration, or use `--launch fsdp2`.")
    wrap = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if wrap != "TRANSFORMER_BASED_WRAP":
        raise _unsupported(f"fsdp_auto_wrap_policy: {wrap}", "Set it to TRANSFORMER_BASED_WRAP.")
    if _is_true("FSDP_OFFLOAD_PARAMS"):
        raise _unsupported("fsdp_offload_params: true", "Set it to false; with more processes the shards are smaller.")
    if _is_true("FSDP_ACTIVATION_CHECKPOINTING"):
        raise _unsupported(
            "fsdp_activation_checkpointing: true",
            "Set it to false, and `gradient_checkpointing: true` in the `train` section of a stage instead.",
        )
    layers = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    sharding = Sharding(
        [name.strip() for name in layers.split(",")] if layers else None,
        _is_true("FSDP_RESHARD_AFTER_FORWARD", default="true"),
        _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"),
    )
    del os.environ["ACCELERATE_USE_FSDP"]
    return sharding


def requested_deepspeed(on_cpu: bool) -> bool:
    """Whether the trainers are to run under DeepSpeed.

    Args:
        on_cpu: Whether the run computes on the CPU. Accelerate 1.15 ignores DeepSpeed if it is told to use the CPU, so
            this removes `ACCELERATE_USE_CPU` from the environment.

    Raises:
        UserError: DeepSpeed is not installed, or its configuration requests ZeRO-3, offloading, or an optimizer or
            scheduler, which the recipe sets.
    """
    if not under_deepspeed():
        return False
    if world_size() == 1:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]  # ZeRO has nothing to split with a single process
        return False
    require_deepspeed()
    config = DeepSpeedPlugin().deepspeed_config
    zero = config["zero_optimization"]
    require_zero_stage(zero.get("stage", 0))
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise _unsupported(
            "offload_optimizer_device", "Set it to none; with more processes each one holds a smaller part."
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise _unsupported(
                f"`{section}` in DeepSpeed's configuration", "Remove it: the `train` section of a stage sets it."
            )
    if on_cpu:
        if torch.cuda.is_available():
            raise _unsupported("DeepSpeed on the CPU of a machine with GPUs", "Use `--launch ddp`.")
        os.environ.pop("ACCELERATE_USE_CPU", None)
    return True


def under_deepspeed() -> bool:
    """Whether the configuration of `accelerate launch` names DeepSpeed, supported or not."""
    return _is_true("ACCELERATE_USE_DEEPSPEED")


def require_supported(configuration: Path) -> None:
    """Rejects an accelerate configuration that requests an unsupported DeepSpeed setup, before any process starts.

    Raises:
        UserError: It requests ZeRO-3, or DeepSpeed is not installed.
    """
    values = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.get("distributed_type") == "DEEPSPEED":
        require_zero_stage((values.get("deepspeed_config") or {}).get("zero_stage", 2))
        require_deepspeed()


def require_deepspeed() -> None:
    """Raises UserError if DeepSpeed is not installed."""
    if not is_deepspeed_available():
        raise UserError("DeepSpeed is not installed", where="--launch", fix="Install it: pip install deepspeed")


def require_zero_stage(stage: int) -> None:
    """Raises UserError for ZeRO stages that a run does not support."""
    if stage not in (1, 2):
        raise _unsupported(
            f"DeepSpeed with zero_stage: {stage}", "Use `--launch fsdp2` to shard the base, or zero_stage: 2."
        )


def require_shardable(recipe: Recipe) -> None:
    """Rejects a base whose weights cannot be sharded.

    Raises:
        UserError: The base is int8: bitsandbytes keeps the scales of such a layer as attributes of its weight, which
            sharding would lose.
    """
    if recipe.quantization.method == "int8":
        raise UserError(
            "an int8 base cannot be sharded", where="quantization.method", fix="Use nf4, or `--launch ddp`."
        )


def _is_true(variable: str, default: str = "false") -> bool:
    return os.environ.get(variable, default).lower() == "true"


def _unsupported(what: str, fix: str) -> UserError:
    return UserError(f"a run does not support {what}", where="--launch", fix=fix)


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
