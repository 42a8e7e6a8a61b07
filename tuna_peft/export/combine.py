"""A stack as one LoRA adapter, exact, from its files alone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from tuna_peft.errors import UserError
from tuna_peft.export.factors import PEFT_PREFIX, FactorShape, StackFactors
from tuna_peft.export.output import require_replaceable, require_space, write_record
from tuna_peft.export.safetensors_stream import TensorSpec, write_safetensors
from tuna_peft.files import atomic_directory
from tuna_peft.models.stack import ADAPTER_WEIGHTS


@dataclass(frozen=True)
class CombineReport:
    """What `combine_stack` wrote.

    Attributes:
        path: The adapter's folder.
        adapters: Names from the bottom of the stack to its top.
        rank: The largest rank of a module, the sum over the adapters that target it.
        modules: Number of modules with factors.
        nbytes: Size of the weights file.
        seconds: Wall-clock time.
    """

    path: Path
    adapters: list[str]
    rank: int
    modules: int
    nbytes: int
    seconds: float


def combine_stack(
    stack_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, upto: str | None = None
) -> CombineReport:
    """Writes the stack as one adapter by rank concatenation; plain `PeftModel.from_pretrained` loads it.

    The scalings go into B in fp32 and the new adapter's alpha equals its rank, so no loader's convention (alpha / r,
    alpha / sqrt(r), one alpha for all ranks) can change it.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        out_dir: Appears whole or not at all; an earlier export there is replaced.
        upto: Combine the stack up to this adapter.

    Raises:
        UserError: A broken or empty stack, adapters that are not plain LoRA, no space, or an `out_dir` in use.
    """
    start = time.perf_counter()
    factors = StackFactors(stack_dir, upto)
    if not factors.shapes:
        raise UserError("the stack has no adapters to combine", where=str(stack_dir))
    groups = {
        module: {
            f"{PEFT_PREFIX}{module}.lora_A.weight": TensorSpec("F32", (shape.rank, shape.inputs)),
            f"{PEFT_PREFIX}{module}.lora_B.weight": TensorSpec("F32", (shape.outputs, shape.rank)),
        }
        for module, shape in factors.shapes.items()
    }
    require_replaceable(out_dir, [factors.folder])
    require_space(out_dir, sum(spec.nbytes for specs in groups.values() for spec in specs.values()))

    def load(module: str) -> dict[str, torch.Tensor]:
        both = factors.of(module)
        return {f"{PEFT_PREFIX}{module}.lora_A.weight": both.a, f"{PEFT_PREFIX}{module}.lora_B.weight": both.b}

    config = _combined_config(factors)
    with atomic_directory(out_dir) as aside:
        write_safetensors(aside / ADAPTER_WEIGHTS, groups, load)
        config.save_pretrained(str(aside))
        write_record(aside, "combined", factors.manifest)
    return CombineReport(
        path=Path(out_dir),
        adapters=[entry.name for entry in factors.manifest.adapters],
        rank=config.r,
        modules=len(factors.shapes),
        nbytes=(Path(out_dir) / ADAPTER_WEIGHTS).stat().st_size,
        seconds=time.perf_counter() - start,
    )


def _combined_config(factors: StackFactors) -> LoraConfig:
    # r is the largest rank: servers such as vLLM size their buffers by it.
    rank = max(shape.rank for shape in factors.shapes.values())
    pattern = _rank_pattern(factors.shapes, rank)
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


def _rank_pattern(shapes: dict[str, FactorShape], default: int) -> dict[str, int]:
    """Ranks that differ from `default`, by the last part of the module names where all its modules agree."""
    by_leaf: dict[str, dict[str, int]] = {}
    for module, shape in shapes.items():
        by_leaf.setdefault(module.rpartition(".")[2], {})[module] = shape.rank
    pattern: dict[str, int] = {}
    for leaf, ranks in by_leaf.items():
        agreed = {leaf: next(iter(ranks.values()))} if len(set(ranks.values())) == 1 else ranks
        pattern.update({key: rank for key, rank in agreed.items() if rank != default})
    return pattern


def _targets(factors: StackFactors) -> list[str]:
    """The union of the adapters' short target lists where that is exact; otherwise every module's full name."""
    targets: set[str] = set()
    for config in factors.configs:
        narrowed = config.layers_to_transform is not None or config.exclude_modules
        if isinstance(config.target_modules, str) or not config.target_modules or narrowed:
            return sorted(factors.shapes)
        targets.update(config.target_modules)
    return sorted(targets)
