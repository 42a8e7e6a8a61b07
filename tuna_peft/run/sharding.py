"""What an accelerate configuration asks of sharding, and what of it a run does.

A run shards its base by itself (`tuna_peft.models.base.shards`): accelerate's FSDP and DeepSpeed's ZeRO-3 would shard
the adapters of each stage along with it, and could not undo that for the next stage or for an evaluation. ZeRO-1 and
ZeRO-2 split only what trains; for them DeepSpeed's own engine runs each stage.
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
    """Settings of `fsdp_config`.

    Attributes:
        layers: Class names of the layers, `fsdp_transformer_layer_cls_to_wrap`; None for the model's own.
        reshard_after_forward: Let gathered weights go between the forward and the backward pass.
        in_turn: Processes load one after the other, so that RAM holds one whole base at a time,
            `fsdp_cpu_ram_efficient_loading`.
    """

    layers: list[str] | None
    reshard_after_forward: bool
    in_turn: bool


def asked_for_sharding() -> Sharding | None:
    """What `accelerate launch` put into the environment; it is ours from then on, so that the trainers of accelerate
    see plain data parallelism.

    Raises:
        UserError: Settings of FSDP that a run does not do.
    """
    if not _is("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise _refusal("FSDP 1", "Set fsdp_version: 2 in the accelerate configuration, or use `--launch fsdp2`.")
    wrap = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if wrap != "TRANSFORMER_BASED_WRAP":
        raise _refusal(f"fsdp_auto_wrap_policy: {wrap}", "Set it to TRANSFORMER_BASED_WRAP.")
    if _is("FSDP_OFFLOAD_PARAMS"):
        raise _refusal("fsdp_offload_params: true", "Set it to false; more processes make smaller shards.")
    if _is("FSDP_ACTIVATION_CHECKPOINTING"):
        raise _refusal(
            "fsdp_activation_checkpointing: true", "Set it to false: `gradient_checkpointing` in `train` does it."
        )
    layers = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    sharding = Sharding(
        [name.strip() for name in layers.split(",")] if layers else None,
        _is("FSDP_RESHARD_AFTER_FORWARD", default="true"),
        _is("FSDP_CPU_RAM_EFFICIENT_LOADING"),
    )
    del os.environ["ACCELERATE_USE_FSDP"]
    return sharding


def asked_for_deepspeed(on_cpu: bool) -> bool:
    """Whether the trainers shall run under DeepSpeed.

    Args:
        on_cpu: Compute on the CPU. Accelerate must not hear of that: it runs DeepSpeed only where a GPU could be.

    Raises:
        UserError: It is not installed; ZeRO-3, or settings that the recipe makes.
    """
    if not under_deepspeed():
        return False
    if world_size() == 1:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]  # nothing to split
        return False
    require_deepspeed()
    config = DeepSpeedPlugin().deepspeed_config
    zero = config["zero_optimization"]
    require_zero_stage(zero.get("stage", 0))
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise _refusal("offload_optimizer_device", "Set it to none; more processes hold less of it each.")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise _refusal(f"`{section}` in DeepSpeed's configuration", "Take it out: `train` of a stage sets it.")
    if on_cpu:
        if torch.cuda.is_available():
            raise _refusal("DeepSpeed on the CPU of a machine with GPUs", "Use `--launch ddp`.")
        os.environ.pop("ACCELERATE_USE_CPU", None)
    return True


def under_deepspeed() -> bool:
    """Whether `accelerate launch` had a configuration for DeepSpeed."""
    return _is("ACCELERATE_USE_DEEPSPEED")


def require_supported(configuration: Path) -> None:
    """Refuses an accelerate configuration that asks for DeepSpeed in vain, before each process would.

    Raises:
        UserError: It asks for ZeRO-3, or DeepSpeed is not installed.
    """
    values = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.get("distributed_type") == "DEEPSPEED":
        require_zero_stage((values.get("deepspeed_config") or {}).get("zero_stage", 2))
        require_deepspeed()


def require_deepspeed() -> None:
    """Raises UserError where DeepSpeed is not installed."""
    if not is_deepspeed_available():
        raise UserError("DeepSpeed is not installed", where="--launch", fix='Run: pip install "tuna-peft[deepspeed]".')


def require_zero_stage(stage: int) -> None:
    """Raises UserError for stages of ZeRO that a run does not do."""
    if stage not in (1, 2):
        raise _refusal(
            f"DeepSpeed with zero_stage: {stage}", "Use `--launch fsdp2` to shard the base, or zero_stage: 2."
        )


def require_shardable(recipe: Recipe) -> None:
    """Refuses a base whose weights cannot be sharded.

    Raises:
        UserError: int8, whose layers keep their scales in their weights.
    """
    if recipe.quantization.method == "int8":
        raise UserError(
            "an int8 base cannot be sharded", where="quantization.method", fix="Use nf4, or `--launch ddp`."
        )


def _is(variable: str, default: str = "false") -> bool:
    return os.environ.get(variable, default).lower() == "true"


def _refusal(what: str, fix: str) -> UserError:
    return UserError(f"a run does not work under {what}", where="--launch", fix=fix)


def world_size() -> int:
    """Processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
