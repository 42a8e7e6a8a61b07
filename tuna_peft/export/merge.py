"""A stack merged into its base: one model in safetensors, streamed, dequantised once and rounded once.

For every target module W' = W_0 + sum_k s_k B_k A_k, in fp32, rounded to the output dtype at the end. Merging adapter
by adapter into a quantised model would round once per adapter.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from tuna_peft.errors import UserError
from tuna_peft.export.base_files import companion_files, copy_companions, locate_base
from tuna_peft.export.base_weight import dequantised, quantised_modules, require_linear, skeleton
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.output import peak_rss_bytes, require_replaceable, require_space, write_record
from tuna_peft.export.safetensors_stream import FLOATS, SafetensorsReader, TensorSpec, write_safetensors
from tuna_peft.files import atomic_directory, write_json
from tuna_peft.models.base import resolve_device, resolve_dtype, safetensors_files

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class MergeReport:
    """What `merge_stack` wrote.

    Attributes:
        path: The model's folder.
        adapters: Names from the bottom of the stack to its top.
        base: `dequantised` or `original`.
        dtype: Output dtype.
        tensors: Number of tensors written.
        merged: How many of them took a part of the stack.
        files: Number of weight files.
        nbytes: Size of all weights.
        seconds: Wall-clock time.
        peak_rss_bytes: The most memory that the process held since its start (not since the merge began).
    """

    path: Path
    adapters: list[str]
    base: str
    dtype: str
    tensors: int
    merged: int
    files: int
    nbytes: int
    seconds: float
    peak_rss_bytes: int | None


def merge_stack(
    stack_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    base: Literal["dequantised", "original"] = "dequantised",
    upto: str | None = None,
    base_model: str | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    load_dtype: str = "auto",
    trust_remote_code: bool = False,
) -> MergeReport:
    """Writes the base with the stack merged in; plain `AutoModelForCausalLM.from_pretrained` loads it.

    One tensor at a time goes from the base's safetensors files to the output's; no model is built.

    Args:
        stack_dir: The folder with `stack.json`.
        out_dir: Appears whole or not at all; an earlier export there is replaced.
        dtype: `bfloat16`, `float16` or `float32`.
        base: `dequantised` adds the stack to the weights that it was trained on, `original` to the stored ones.
            The same for an unquantised base.
        upto: Merge the stack up to this adapter.
        base_model: Where the base is now, if it has moved.
        max_shard_size: Largest size of a weights file, for example `5GB`.
        device: Where to quantise and add; `auto` is the GPU when there is one.
        load_dtype: What the live model is loaded with, as in `load_base`.

    Raises:
        UserError: A broken stack, another or an unreadable base, a layout in which a weight is not found, no space,
            an `out_dir` in use, or weights that do not fit the dtype.
    """
    start = time.perf_counter()
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", fix=f"Use one of {', '.join(DTYPES)}.")
    if base not in ("dequantised", "original"):
        raise UserError(f"unknown base {base!r}", fix="Use dequantised or original.")
    factors = StackFactors(stack_dir, upto)
    folder = locate_base(factors.manifest, base_model, stack_dir)
    quantization = factors.manifest.quantization if base == "dequantised" else None
    target = resolve_device(device)
    source = SafetensorsReader(safetensors_files(str(folder)))
    weights = _Weights(source, factors, quantization, target, resolve_dtype(load_dtype, target), dtype)
    weights.prepare(folder, trust_remote_code)

    specs = {
        name: TensorSpec(DTYPES[dtype] if spec.dtype in FLOATS else spec.dtype, spec.shape)
        for name, spec in source.specs.items()
    }
    total = sum(spec.nbytes for spec in specs.values())
    require_replaceable(out_dir, [stack_dir, folder])
    require_space(out_dir, total + sum(path.stat().st_size for path in companion_files(folder)))
    with atomic_directory(out_dir) as aside:
        copy_companions(folder, aside, dtype)
        files = _write_shards(aside, specs, weights, max_shard_size)
        write_record(aside, "merged", factors.manifest, base=base, dtype=dtype)
    return MergeReport(
        path=Path(out_dir),
        adapters=[entry.name for entry in factors.manifest.adapters],
        base=base,
        dtype=dtype,
        tensors=len(specs),
        merged=len(factors.shapes),
        files=files,
        nbytes=total,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


class _Weights:
    """The output's tensors, made one at a time."""

    def __init__(
        self,
        source: SafetensorsReader,
        factors: StackFactors,
        quantization: dict[str, Any] | None,
        device: torch.device,
        load_dtype: torch.dtype,
        dtype: str,
    ):
        self.source, self.factors, self.quantization = source, factors, quantization
        self.device, self.load_dtype, self.dtype = device, load_dtype, dtype
        self.quantised: set[str] = set()

    def prepare(self, folder: Path, trust_remote_code: bool) -> None:
        """Finds the quantised modules and checks that every weight to be changed is where it is expected."""
        model = skeleton(folder, self.quantization, trust_remote_code=trust_remote_code)
        self.quantised = quantised_modules(model)
        changed = [*self.factors.shapes, *sorted(self.quantised)]
        require_linear(model, changed)
        for module in changed:
            spec = self.source.specs.get(module + ".weight")
            if spec is None:
                raise UserError(
                    f"the checkpoint stores no weight for {module!r} under its own name (fused or renamed weights?)",
                    where=str(folder),
                    fix="Save the base again with transformers' save_pretrained, or publish the combined adapter.",
                )
            shape = self.factors.shapes.get(module)
            if shape and spec.shape != (shape.outputs, shape.inputs):
                raise UserError(
                    f"the adapters' {module!r} is {(shape.outputs, shape.inputs)}, the base's {spec.shape}",
                    where=str(folder),
                    fix="Merge into the base that the stack was trained on.",
                )

    def make(self, name: str) -> torch.Tensor:
        """The tensor `name` of the merged model, in the output dtype unless it holds integers."""
        module = name.removesuffix(".weight")
        weight = self.source.read(name, self.device)
        if self.quantization is not None and module in self.quantised:
            weight = dequantised(weight, self.quantization, self.load_dtype)
        if name.endswith(".weight") and module in self.factors.shapes:
            part = self.factors.of(module)
            # A copy, because the tensor may be the file itself, mapped into memory.
            weight = weight.to(torch.float32, copy=True).addmm_(part.b.to(self.device), part.a.to(self.device))
        if not weight.is_floating_point():
            return weight
        rounded = weight.to(getattr(torch, self.dtype))
        if self.dtype == "float16" and not rounded.isfinite().all():
            raise UserError(f"{name!r} has values beyond float16's range", fix="Use bfloat16 or float32.")
        return rounded


def _write_shards(folder: Path, specs: dict[str, TensorSpec], weights: _Weights, max_shard_size: str | int) -> int:
    """Writes the weights as transformers names them, one file or shards with an index; returns the number of files."""
    split = split_state_dict_into_shards_factory(
        specs,  # it needs nothing of a tensor but its size
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: specs[name] for name in names}, weights.make)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return len(split.filename_to_tensors)
