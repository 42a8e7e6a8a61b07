"""Concatenates a stack into one LoRA adapter, exactly or compressed to a smaller rank, without loading the base."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from tuna_peft.errors import UserError
from tuna_peft.export.compress import compress
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.output import mean_and_max, require_replaceable, require_space, write_record
from tuna_peft.export.safetensors_stream import TensorSpec, write_safetensors
from tuna_peft.files import atomic_directory, write_json
from tuna_peft.models.stack.adapters import ADAPTER_WEIGHTS, LORA_A, LORA_B, PEFT_PREFIX, save_config

COMPRESSION = "compression_error.json"


@dataclass(frozen=True)
class CombineReport:
    """What `combine_stack` wrote.

    Attributes:
        path: The adapter's folder.
        adapters: Names from the bottom of the stack to its top.
        rank: The largest rank of a module, the sum over the adapters that target it.
        modules: Number of modules with factors.
        compression_error: For a smaller rank: mean and maximum over the modules of `|B A - B' A'| / |B A|` (Frobenius
            norm); `compression_error.json` in the folder has the value of every module.
        nbytes: Size of the weights file.
        seconds: Wall-clock time.
    """

    path: Path
    adapters: list[str]
    rank: int
    modules: int
    compression_error: dict[str, float] | None
    nbytes: int
    seconds: float


def combine_stack(
    stack_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    upto: str | None = None,
    rank: int | None = None,
) -> CombineReport:
    """Writes the stack as one adapter by rank concatenation; plain `PeftModel.from_pretrained` loads it.

    The scalings go into B in fp32 and the new adapter's alpha equals its rank, so no loader's convention (alpha / r,
    alpha / sqrt(r), one alpha for all ranks) can change it.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        out_dir: Written atomically; an earlier export there is replaced.
        upto: Combine the stack up to this adapter.
        rank: Compress to this rank, see `compress`; by default the ranks add up and the result is exact.

    Raises:
        UserError: A broken or empty stack, adapters that are not plain LoRA, no space, or an `out_dir` in use.
    """
    start = time.perf_counter()
    factors = StackFactors(stack_dir, upto)
    if not factors.shapes:
        raise UserError("the stack has no adapters to combine", where=str(stack_dir))
    if rank is not None and rank < 1:
        raise UserError(f"cannot compress to rank {rank}", fix="Use a rank of 1 or more.")
    ranks = {module: min(shape.rank, rank or shape.rank) for module, shape in factors.shapes.items()}
    groups = {
        module: {
            f"{PEFT_PREFIX}{module}{LORA_A}": TensorSpec("F32", (ranks[module], shape.inputs)),
            f"{PEFT_PREFIX}{module}{LORA_B}": TensorSpec("F32", (shape.outputs, ranks[module])),
        }
        for module, shape in factors.shapes.items()
    }
    require_replaceable(out_dir, [factors.folder])
    require_space(out_dir, sum(spec.nbytes for specs in groups.values() for spec in specs.values()))

    errors: dict[str, float] = {}

    def load(module: str) -> dict[str, torch.Tensor]:
        both, errors[module] = compress(factors.of(module), ranks[module])
        return {f"{PEFT_PREFIX}{module}{LORA_A}": both.a, f"{PEFT_PREFIX}{module}{LORA_B}": both.b}

    config = _combined_config(factors, ranks)
    with atomic_directory(out_dir) as aside:
        write_safetensors(aside / ADAPTER_WEIGHTS, groups, load)
        save_config(config, aside)
        if rank is not None:
            write_json(aside / COMPRESSION, errors)
        write_record(aside, "combined", factors.manifest, rank=rank)
    return CombineReport(
        path=Path(out_dir),
        adapters=[entry.name for entry in factors.manifest.adapters],
        rank=config.r,
        modules=len(factors.shapes),
        compression_error=None if rank is None else mean_and_max(errors),
        nbytes=(Path(out_dir) / ADAPTER_WEIGHTS).stat().st_size,
        seconds=time.perf_counter() - start,
    )


def _combined_config(factors: StackFactors, ranks: dict[str, int]) -> LoraConfig:
    # r is the largest rank: servers such as vLLM size their buffers by it.
    rank = max(ranks.values())
    pattern = _rank_pattern(ranks, rank)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(factors),
        fan_in_fan_out=factors.configs[0].fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=factors.manifest.base["model"],
        revision=factors.manifest.base["revision"],
    )


def _rank_pattern(ranks: dict[str, int], default: int) -> dict[str, int]:
    """Ranks other than `default`, by the last part of module names if these modules agree, else by full name."""
    by_leaf: dict[str, dict[str, int]] = {}
    for module, rank in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], {})[module] = rank
    pattern: dict[str, int] = {}
    for leaf, own in by_leaf.items():
        agreed = {leaf: next(iter(own.values()))} if len(set(own.values())) == 1 else own
        pattern.update({key: rank for key, rank in agreed.items() if rank != default})
    return pattern


def _targets(factors: StackFactors) -> list[str]:
    """The union of the adapters' target lists if it selects the same modules, else every module's full name."""
    targets: set[str] = set()
    for config in factors.configs:
        narrowed = config.layers_to_transform is not None or config.exclude_modules
        if isinstance(config.target_modules, str) or not config.target_modules or narrowed:
            return sorted(factors.shapes)
        targets.update(config.target_modules)
    return sorted(targets)
