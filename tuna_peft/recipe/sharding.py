"""What an accelerate configuration asks of sharding, and what of it a run does.

A run shards by itself (`tuna_peft.models.shards`): accelerate's FSDP would shard the adapters of each stage along with
the base, and could not take that back for the next stage, for an evaluation, or on a CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

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
        UserError: DeepSpeed, or settings of FSDP that a run does not do.
    """
    if _is("ACCELERATE_USE_DEEPSPEED"):
        raise _no_deepspeed()
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


def require_supported(configuration: Path) -> None:
    """Refuses an accelerate configuration for DeepSpeed before accelerate misses its package.

    Raises:
        UserError: It is one.
    """
    values = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.get("distributed_type") == "DEEPSPEED":
        raise _no_deepspeed()


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


def _no_deepspeed() -> UserError:
    """It steps after each backward pass, of which a token budget makes several and not the same number everywhere; and
    its bf16 casts all floating weights, the frozen adapters of earlier stages included."""
    return _refusal("DeepSpeed", "Use `--launch fsdp2`, which shards the base, or `--launch ddp`.")


def _refusal(what: str, fix: str) -> UserError:
    return UserError(f"a run does not work under {what}", where="--launch", fix=fix)
