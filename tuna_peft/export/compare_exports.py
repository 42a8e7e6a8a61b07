"""Writes every kind of export of a stack in turn and measures its size and KL divergence, for `merge --compare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from tuna_peft.errors import UserError
from tuna_peft.export.check import ExportComparison
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.divergence import Divergence
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.load_gguf import gguf_files
from tuna_peft.export.loading import BASE
from tuna_peft.export.merge import MERGED_DTYPES, MergeReport, merge_stack
from tuna_peft.files import temporary_directory
from tuna_peft.models.stack.find import find_stack

GGUF_TYPES = ("f16", "q8_0", "q4_0")


class Written(Protocol):
    """The report of an export; `kept_share` too, if it is a merged model."""

    @property
    def nbytes(self) -> int:
        """Size of its weights in bytes."""


@dataclass(frozen=True)
class ExportOption:
    """One kind of export, with its measurements.

    Attributes:
        name: What is written, for example `dequantized, bfloat16`.
        nbytes: Size of its weights in bytes; None for the base alone and for a failed export.
        divergence: KL divergence from the unmerged adapters; None for a failed export.
        reason: Why the export failed.
        kept_share: Which share of the adapters' update a merged model keeps; None if that was not measured.
        is_noise: Whether this is the stack itself in the dtype of training: what is nearer cannot be told apart there.
    """

    name: str
    nbytes: int | None
    divergence: Divergence | None
    reason: str | None = None
    kept_share: float | None = None
    is_noise: bool = False


def compare_exports(
    stack_dir: str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    work_dir: str | os.PathLike[str],
    *,
    upto: str | None = None,
    base_model: str | None = None,
    device: str = "auto",
    write_gguf: Callable[..., Written] | None = None,
) -> Iterator[ExportOption]:
    """The base alone, combined adapters at full and at half rank, and models merged into both bases in every format.

    All of them compute in fp32, because 16 bits would hide what the exports round. If training computed in 16 bits,
    the unmerged adapters in that dtype are measured too. Adapters of a quantized base are also measured on the base
    without quantization, and with a copy of the quantized base beside them.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        prompts: Token ids of each prompt.
        work_dir: Holds one export at a time while it is measured.
        upto, base_model, device: As in `merge_stack`.
        write_gguf: `export_gguf` with the stack; None leaves GGUF files out.

    Raises:
        UserError: A broken or empty stack, another base, no prompts.
    """
    source = find_stack(stack_dir)
    comparison = ExportComparison(source, prompts, upto=upto, base_model=base_model, device=device)
    yield ExportOption(BASE, None, comparison.base())
    if comparison.noise is not None:
        name = f"unmerged, {str(comparison.dtype).removeprefix('torch.')}"
        yield ExportOption(name, None, comparison.noise, is_noise=True)

    combine = partial(combine_stack, source, upto=upto, base_model=base_model)
    full = max(shape.rank for shape in StackFactors(source, upto).shapes.values())
    half = -(-full // 2)
    yield _measured(f"adapter, rank {full}", work_dir, combine, comparison.adapter)
    yield _measured(f"adapter, rank {half}", work_dir, partial(combine, rank=half), comparison.adapter)
    quantised = comparison.is_quantized
    if quantised:
        yield _measured("adapter, unquantized base", work_dir, combine, comparison.adapter_on_unquantized)
        write = partial(combine, with_base=True, device=device)
        yield _measured("adapter with its base", work_dir, write, comparison.model)
    for base in ("dequantized", "original") if quantised else ("original",):
        merge = partial(
            merge_stack, source, base=base, upto=upto, base_model=base_model, device=device, allow_lost_update=True
        )
        for dtype in MERGED_DTYPES:
            yield _measured(f"{base}, {dtype}", work_dir, partial(merge, dtype=dtype), comparison.model)
        if write_gguf is None:
            continue
        for type in GGUF_TYPES:
            write_both = partial(_write_merged_gguf, merge, partial(write_gguf, types=(type,)))
            measure = lambda out: comparison.model(*gguf_files(out))  # noqa: E731
            yield _measured(f"{base}, GGUF {type}", work_dir, write_both, measure)


def _write_merged_gguf(
    merge: Callable[[Path], MergeReport], write_gguf: Callable[[Path, Path], Written], out: Path
) -> Written:
    return write_gguf(merge(out.with_name("merged")).path, out)


def _measured(
    name: str,
    work_dir: str | os.PathLike[str],
    write: Callable[[Path], Written],
    measure: Callable[[Path], Divergence],
) -> ExportOption:
    with temporary_directory(Path(work_dir) / "compare") as folder:
        out = folder / "export"
        try:
            report = write(out)
            return ExportOption(name, report.nbytes, measure(out), kept_share=getattr(report, "kept_share", None))
        except UserError as error:  # for example no space, or float16 overflows: other options may still work
            return ExportOption(name, None, None, error.what)
