"""Concatenates a stack into one LoRA adapter, exactly or compressed to a smaller rank, one module at a time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tuna_peft.errors import UserError
from tuna_peft.export.base_files import copy_companions, copy_tokenizer, locate_base
from tuna_peft.export.compress import compress
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.merge import write_shards
from tuna_peft.export.output import mean_and_max, require_replaceable, require_space, write_record
from tuna_peft.export.packed_weights import PackedBase
from tuna_peft.export.safetensors_stream import TensorSpec, write_safetensors
from tuna_peft.files import atomic_directory, write_json
from tuna_peft.models.base.load import resolve_device, resolve_dtype
from tuna_peft.models.stack.adapters import ADAPTER_WEIGHTS, LORA_A, LORA_B, PEFT_PREFIX, save_config
from tuna_peft.models.stack.combined import sum_config

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
        nbytes: Size of all weights.
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
    with_base: bool = False,
    base_model: str | None = None,
    device: str = "auto",
) -> CombineReport:
    """Writes the stack as one adapter by rank concatenation; plain `PeftModel.from_pretrained` loads it.

    The scalings go into B, in fp32; for its configuration see `sum_config`. The base's tokenizer comes along, with the
    training prompt as its chat template.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        out_dir: Written atomically; an earlier export there is replaced.
        upto: Combine the stack up to this adapter.
        rank: Compress to this rank, see `compress`; by default the ranks add up and the result is exact.
        with_base: Write the base beside the adapter, in the 4 bits of training. Plain
            `AutoModelForCausalLM.from_pretrained` then loads both from this folder (the adapter in the dtype of
            training, if that has 16 bits).
        base_model: Where the base is now, if it has moved.
        device: Device that quantizes the base.

    Raises:
        UserError: A broken or empty stack, adapters that are not plain LoRA, no space, an `out_dir` in use; with its
            base, also one that is missing or was not trained in 4 bits.
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
    manifest = factors.manifest
    total = sum(spec.nbytes for specs in groups.values() for spec in specs.values())
    if with_base:
        folder, target = locate_base(manifest, base_model, factors.folder), resolve_device(device)
        load_dtype = manifest.load_dtype or str(resolve_dtype("auto", target)).removeprefix("torch.")
        packed = PackedBase(folder, manifest.quantization, load_dtype, target)
        total += sum(spec.nbytes for specs in packed.groups.values() for spec in specs.values())
    require_replaceable(out_dir, [factors.folder])
    require_space(out_dir, total)

    errors: dict[str, float] = {}

    def load(module: str) -> dict[str, torch.Tensor]:
        both, errors[module] = compress(factors.of(module), ranks[module])
        return {f"{PEFT_PREFIX}{module}{LORA_A}": both.a, f"{PEFT_PREFIX}{module}{LORA_B}": both.b}

    # The folder itself, if it holds the base: `AutoPeftModelForCausalLM` would take the unquantized one.
    base = {"model": str(Path(out_dir).resolve()), "revision": None} if with_base else manifest.base
    config = sum_config(factors.configs, ranks, base=base["model"], revision=base["revision"])
    with atomic_directory(out_dir) as aside:
        write_safetensors(aside / ADAPTER_WEIGHTS, groups, load)
        save_config(config, aside)
        if with_base:
            copy_companions(folder, aside, packed.config_changes(), manifest.prompt)
            write_shards(aside, packed)
        else:
            copy_tokenizer(manifest, base_model, aside)
        if rank is not None:
            write_json(aside / COMPRESSION, errors)
        write_record(aside, "combined", manifest, rank=rank)
    return CombineReport(
        path=Path(out_dir),
        adapters=[entry.name for entry in manifest.adapters],
        rank=config.r,
        modules=len(factors.shapes),
        compression_error=None if rank is None else mean_and_max(errors),
        nbytes=total,
        seconds=time.perf_counter() - start,
    )
