"""Merges a stack into its base as one model in safetensors, streamed tensor by tensor, dequantised and rounded once.

For every target module W' = W_0 + sum_k s_k B_k A_k, in fp32, rounded to the output dtype at the end. Merging adapter
by adapter into a quantised model would round once per adapter.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import split_state_dict_into_shards_factory

from tuna_peft.errors import UserError
from tuna_peft.export.base_files import companion_files, copy_companions, locate_base
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.kept_update import KeptUpdate, ModuleUpdate
from tuna_peft.export.merged_weights import QUANTIZED, MergedWeights
from tuna_peft.export.output import (
    require_replaceable,
    require_space,
    resumable_directory,
    write_record,
)
from tuna_peft.export.packed_weights import PackedBase
from tuna_peft.export.safetensors_stream import DTYPES, write_safetensors
from tuna_peft.files import write_json
from tuna_peft.limits import peak_rss_bytes
from tuna_peft.models.base.load import resolve_device, resolve_dtype
from tuna_peft.progress import Progress

MERGED_DTYPES = (*DTYPES, *QUANTIZED)
UPDATES = "kept_update.json"


@dataclass(frozen=True)
class MergeReport:
    """What `merge_stack` wrote.

    Attributes:
        path: The model's folder.
        adapters: Names from the bottom of the stack to its top.
        base: `dequantized` or `original`.
        dtype: Output dtype, `nf4` or `int8`.
        tensors: Number of tensors written.
        merged: Number of modules that adapters were added to.
        kept_update: Which share of the adapters' update the weights have after rounding; None for `float32`.
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
    kept_update: KeptUpdate | None
    files: int
    nbytes: int
    seconds: float
    peak_rss_bytes: int | None

    @property
    def kept_share(self) -> float | None:
        """The share in `kept_update`."""
        return None if self.kept_update is None else self.kept_update.share


def merge_stack(
    stack_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    base: Literal["dequantized", "dequantised", "original"] = "dequantized",
    upto: str | None = None,
    base_model: str | None = None,
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    load_dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_lost_update: bool = False,
) -> MergeReport:
    """Writes the base with the stack merged in; plain `AutoModelForCausalLM.from_pretrained` loads it.

    One tensor at a time goes from the base's safetensors files to the output's; no model is built. An interrupted
    merge resumes when it is called again with the same arguments.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        out_dir: Written atomically; an earlier export there is replaced.
        dtype: `bfloat16`, `float16`, `float32`; `nf4` or `int8`: quantized again, in the form that transformers loads.
        base: `dequantized` adds the stack to the weights that it was trained on (for an unquantised base: in the
            dtype of training), `original` to the stored weights; `dequantised` is accepted too.
        upto: Merge the stack up to this adapter.
        base_model: Where the base is now, if it has moved.
        max_shard_size: Largest size of a weights file, for example `5GB`.
        device: Device that quantises and adds; `auto` is the GPU if there is one.
        load_dtype: Dtype in which the base was loaded for training; `auto` reads it from the manifest and, if it is
            missing there, takes the dtype that `load_base` would choose on this machine.
        allow_lost_update: Only warn when rounding to `dtype` undoes more than half of the adapters' update.

    Raises:
        UserError: A broken stack, another or an unreadable base, a layout in which a weight is not found, no space,
            an `out_dir` in use, weights that do not fit the dtype, or a dtype in which most of the update is lost.
    """
    start = time.perf_counter()
    if dtype not in MERGED_DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", fix=f"Use one of {', '.join(MERGED_DTYPES)}.")
    if base == "dequantised":  # the name of the value in earlier versions
        base = "dequantized"
    if base not in ("dequantized", "original"):
        raise UserError(f"unknown base {base!r}", fix="Use dequantized or original.")
    factors = StackFactors(stack_dir, upto)
    manifest = factors.manifest
    folder = locate_base(manifest, base_model, factors.folder)
    target = resolve_device(device)
    loaded_in = resolve_dtype(manifest.load_dtype or "auto" if load_dtype == "auto" else load_dtype, target)
    weights = MergedWeights(folder, factors, base, dtype, loaded_in, target, trust_remote_code)

    total = sum(spec.nbytes for specs in weights.groups.values() for spec in specs.values())
    require_replaceable(out_dir, [factors.folder, folder])
    require_space(out_dir, total + sum(path.stat().st_size for path in companion_files(folder)))
    plan = {
        "stack": asdict(manifest),
        "base": base,
        "dtype": dtype,
        "load_dtype": str(loaded_in),
        "max_shard_size": max_shard_size,
        "device": target.type,
    }
    with resumable_directory(out_dir, plan) as aside:
        copy_companions(folder, aside, weights.config_changes(), manifest.prompt, trust_remote_code=trust_remote_code)
        with Progress("merging", total, "B") as progress:
            files = _write_measured(aside, weights, max_shard_size, progress.update)
        kept = KeptUpdate.over(weights.updates)
        if kept is not None:
            kept.check(f"{dtype} weights", _instead_of(dtype), allow_lost_update=allow_lost_update)
        write_record(aside, "merged", manifest, base=base, dtype=dtype, kept_update=kept and asdict(kept))
    return MergeReport(
        path=Path(out_dir),
        adapters=[entry.name for entry in manifest.adapters],
        base=base,
        dtype=dtype,
        tensors=sum(map(len, weights.groups.values())),
        merged=len(factors.shapes),
        kept_update=kept,
        files=len(files),
        nbytes=total,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _instead_of(dtype: str) -> str:
    """What to do where rounding to `dtype` loses too much of the update."""
    if dtype in QUANTIZED:
        return (
            "Use `--dtype bfloat16` or `float32` (in a recipe `export.merge.dtype`); in 4 bits, `tuna-peft combine "
            "--with-base` keeps the whole update."
        )
    return "Use `--dtype float32` (in a recipe `export.merge.dtype`)."


def _write_measured(
    folder: Path, weights: MergedWeights, max_shard_size: str | int, report: Callable[[int], object]
) -> list[Path]:
    """Writes the weights, and `kept_update.json` after every file: once a module would take longer than merging it."""
    updates = folder / UPDATES
    if updates.is_file():
        measured = json.loads(updates.read_text(encoding="utf-8"))
        weights.updates.update({module: ModuleUpdate(**sums) for module, sums in measured.items()})

    def save() -> None:
        if weights.updates:
            write_json(updates, {module: asdict(weights.updates[module]) for module in sorted(weights.updates)})

    files = write_shards(folder, weights, max_shard_size, report, save)
    if missing := weights.not_measured():  # written before an interruption, in the file that it left incomplete
        for group in missing:
            weights.make(group)
        save()
    return files


def write_shards(
    folder: Path,
    weights: MergedWeights | PackedBase,
    max_shard_size: str | int = "5GB",
    report: Callable[[int], object] = lambda nbytes: None,
    after_file: Callable[[], object] = lambda: None,
) -> list[Path]:
    """Writes the weights as transformers names them, one file or shards with an index; skips shards that are there."""
    sizes = {group: sum(spec.nbytes for spec in specs.values()) for group, specs in weights.groups.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda nbytes: nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        if (folder / file).is_file():
            report(sum(sizes[name] for name in names))
        else:
            write_safetensors(folder / file, {name: weights.groups[name] for name in names}, weights.make, report)
            after_file()
    if split.is_sharded:
        weight_map = {
            tensor: file for group, file in split.tensor_to_filename.items() for tensor in weights.groups[group]
        }
        write_json(folder / "model.safetensors.index.json", {"metadata": split.metadata, "weight_map": weight_map})
    return [folder / file for file in split.filename_to_tensors]
