"""One LoRA adapter that computes the sum of a stack: its configuration, and the sum of a stack in memory.

Checkpoints have it at their root, for plain PEFT. `tuna_peft.export.combine` writes the same from a stack's files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tuna_peft.models.base.load import model_id
from tuna_peft.models.stack.adapters import (
    ADAPTER_WEIGHTS,
    LORA_A,
    LORA_B,
    PEFT_PREFIX,
    adapter_names,
    adapter_state,
    save_config,
)
from tuna_peft.models.stack.manifest import ADAPTER_FILES


def save_sum(model: PeftModel, folder: Path) -> None:
    """Writes the sum of the stack to `folder` as one adapter, beside the stack that `write_stack` wrote there.

    The ranks add up and the scalings go into B, in fp32, so it is exact. For a single adapter it is that adapter,
    without a second copy on the disk where the file system has hard links.
    """
    names = adapter_names(model)
    if len(names) == 1:
        for file in ADAPTER_FILES:
            (folder / file).unlink(missing_ok=True)
            try:
                os.link(folder / names[0] / file, folder / file)
            except OSError:
                shutil.copyfile(folder / names[0] / file, folder / file)
        return
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    for name in names:
        state = adapter_state(model, name)
        for module in (key.removesuffix(LORA_A) for key in state if key.endswith(LORA_A)):
            scaling: float = model.get_submodule(module).scaling[name]
            parts.setdefault(module, []).append((state[module + LORA_A], state[module + LORA_B], scaling))
    tensors = {}
    for module, factors in parts.items():
        down_RI = torch.cat([down.float() for down, _, _ in factors])
        up_OR = down_RI.new_empty(len(factors[0][1]), len(down_RI))
        columns_of_each = up_OR.split([up.shape[1] for _, up, _ in factors], dim=1)
        for (_, up, scaling), columns in zip(factors, columns_of_each, strict=True):
            torch.mul(up.float(), scaling, out=columns)
        tensors[module + LORA_A], tensors[module + LORA_B] = down_RI.cpu(), up_OR.cpu()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base = cast(PreTrainedModel, model.get_base_model())
    ranks = {module.removeprefix(PEFT_PREFIX): len(tensors[module + LORA_A]) for module in parts}
    configs = [cast(LoraConfig, model.peft_config[name]) for name in names]
    config = sum_config(configs, ranks, base=model_id(base), revision=getattr(base.config, "_commit_hash", None))
    save_config(config, folder)


def sum_config(
    configs: Sequence[LoraConfig], ranks: dict[str, int], *, base: str | None, revision: str | None
) -> LoraConfig:
    """The configuration of one adapter in place of several.

    Args:
        configs: Those of the stack, from the bottom to the top.
        ranks: The rank of every module, by its full name in the base.
        base: The model that the adapters were trained on.
        revision: Its revision on the Hub.
    """
    # r is the largest rank: servers such as vLLM size their buffers by it. Alpha equals the rank, so no loader's
    # convention (alpha / r, alpha / sqrt(r), one alpha for all ranks) can change the scaling of 1.
    rank = max(ranks.values())
    pattern = _rank_pattern(ranks, rank)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(configs, ranks),
        fan_in_fan_out=configs[0].fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
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


def _targets(configs: Sequence[LoraConfig], modules: Collection[str]) -> list[str]:
    """The union of the adapters' target lists if it selects the same modules, else every module's full name."""
    targets: set[str] = set()
    for config in configs:
        narrowed = config.layers_to_transform is not None or config.exclude_modules
        if isinstance(config.target_modules, str) or not config.target_modules or narrowed:
            return sorted(modules)
        targets.update(config.target_modules)
    return sorted(targets)
