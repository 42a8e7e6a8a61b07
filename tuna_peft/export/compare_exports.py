"""Writes every kind of export of a stack in turn and measures its size and KL divergence, for `merge --compare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuna_peft.errors import UserError
from tuna_peft.export.check import ExportComparison
from tuna_peft.export.combine import CombineReport, combine_stack
from tuna_peft.export.divergence import Divergence
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.merge import MERGED_DTYPES, MergeReport, merge_stack
from tuna_peft.files import temporary_directory
from tuna_peft.models.stack.find import find_stack
from tuna_peft.models.stack.manifest import read_manifest


@dataclass(frozen=True)
class ExportOption:
    """One kind of export, with its measurements.

    Attributes:
        name: What is written, for example `dequantized, bfloat16`.
        nbytes: Size of its weights in bytes; None for the base alone and for a failed export.
        divergence: KL divergence from the unmerged adapters; None for a failed export.
        reason: Why the export failed.
        is_noise: Whether this is the stack itself in the dtype of training: what is nearer cannot be told apart there.
    """

    name: str
    nbytes: int | None
    divergence: Divergence | None
    reason: str | None = None
    is_noise: bool = False


def compare_exports(
    stack_dir: str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    work_dir: str | os.PathLike[str],
    *,
    upto: str | None = None,
    base_model: str | None = None,
    device: str = "auto",
) -> Iterator[ExportOption]:
    """The base alone, the combined adapter (at full and at half rank), and merged models of both bases in every dtype.

    All of them compute in fp32, because 16 bits would hide what the exports round. If training computed in 16 bits,
    the unmerged adapters in that dtype are measured too.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        prompts: Token ids of each prompt.
        work_dir: Holds one export at a time while it is measured.
        upto, base_model, device: As in `merge_stack`.

    Raises:
        UserError: A broken or empty stack, another base, no prompts.
    """
    source = find_stack(stack_dir)
    manifest = read_manifest(source)
    comparison = ExportComparison(source, prompts, upto=upto, base_model=base_model, device=device, dtype="float32")
    yield ExportOption("base without the stack", None, comparison.base())
    if manifest.load_dtype not in (None, "float32"):
        noise = comparison.stack(manifest.load_dtype)
        yield ExportOption(f"unmerged adapters, {manifest.load_dtype}", None, noise, is_noise=True)

    full = max(shape.rank for shape in StackFactors(source, upto).shapes.values())
    half = -(-full // 2)
    for name, rank in ((f"adapter, rank {full}", None), (f"adapter, rank {half}", half)):
        write = partial(combine_stack, source, upto=upto, rank=rank)
        yield _measured(name, work_dir, write, comparison.adapter)
    quantised = manifest.quantization is not None
    for base in ("dequantized", "original") if quantised else ("original",):
        for dtype in MERGED_DTYPES:
            merge = partial(
                merge_stack, base=base, dtype=dtype, upto=upto, base_model=base_model, device=device,
                allow_lost_update=True,
            )  # fmt: skip
            yield _measured(f"{base}, {dtype}", work_dir, partial(merge, source), comparison.model)


def _measured(
    name: str,
    work_dir: str | os.PathLike[str],
    write: Callable[[Path], CombineReport | MergeReport],
    measure: Callable[[Path], Divergence],
) -> ExportOption:
    with temporary_directory(Path(work_dir) / "compare") as folder:
        out = folder / "export"
        try:
            return ExportOption(name, write(out).nbytes, measure(out))
        except UserError as error:  # for example no space, or float16 overflows: other options may still work
            return ExportOption(name, None, None, error.what)
