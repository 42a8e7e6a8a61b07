"""GGUF files of a stack, each merged into the base that gives the smaller KL divergence from the stack."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tuna_peft.errors import UserError
from tuna_peft.export.check import ExportComparison
from tuna_peft.export.divergence import Divergence
from tuna_peft.export.gguf.model import LOST_UPDATE, GGUFReport, check_types, export_gguf, read_record
from tuna_peft.export.gguf.modelfile import MODELFILE
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.output import RECORD, require_replaceable
from tuna_peft.files import atomic_directory, write_json

BASES: tuple[Literal["dequantized", "original"], ...] = ("dequantized", "original")


def export_gguf_of_stack(
    stack_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    *,
    types: Sequence[str] = ("q8_0",),
    name: str,
    upto: str | None = None,
    base_model: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    device: str = "auto",
    allow_lost_update: bool = False,
) -> tuple[GGUFReport, dict[str, dict[str, Divergence]]]:
    """Merges into the dequantized and into the original base, and keeps for each type the file with the smaller KL.

    On the dequantized base, the file's quantization rounds weights that were quantized once already. On the original
    base they are rounded once, but the adapters were not trained on it. Which costs less depends on model and type.

    Args:
        stack_dir: The folder with `stack.json`.
        out_dir: Appears whole or not at all; until then both merged models and all files are in a folder beside it.
        prompts: Token ids of each prompt to measure on.
        types, name, imatrix, allow_lost_update: As in `export_gguf`.
        upto, base_model, device: As in `merge_stack`.

    Returns:
        What was written, and for each file the divergence from the stack on each base.

    Raises:
        UserError: As `merge_stack` and `export_gguf`, or no prompts.
    """
    types = check_types(types)
    if not prompts:
        raise UserError("no prompts to choose a base with", fix="Give data with --prompts, or a run's folder.")
    require_replaceable(out_dir, [stack_dir])
    loading: dict[str, Any] = {"upto": upto, "base_model": base_model, "device": device}
    comparison = ExportComparison(stack_dir, prompts, **loading)
    beside = Path(out_dir).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, Divergence]] = {}
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=beside) as work:
        reports: dict[str, GGUFReport] = {}
        for base in BASES:
            merged = merge_stack(stack_dir, Path(work) / "merged", base=base, allow_lost_update=True, **loading)
            reports[base] = export_gguf(
                merged.path, Path(work) / base, types=types, name=name, imatrix=imatrix, stack_dir=stack_dir,
                allow_lost_update=True,  # only the chosen files count
            )  # fmt: skip
            for file in reports[base].files:
                measured.setdefault(file, {})[base] = comparison.model(Path(work) / base / file)
        chosen = {file: min(found, key=lambda base: found[base].kl_mean) for file, found in measured.items()}
        kept = {file: reports[base].kept_update[file] for file, base in chosen.items()}
        for file, found in kept.items():
            if found is not None:
                found.check(file, LOST_UPDATE, allow_lost_update=allow_lost_update)
        first = Path(work) / next(iter(chosen.values()))
        with atomic_directory(out_dir) as aside:
            for file, folder in chosen.items():
                os.replace(Path(work) / folder / file, aside / file)
            for other in [first / MODELFILE, *first.glob("LICENSE*"), *first.glob("NOTICE*")]:
                shutil.copyfile(other, aside / other.name)
            write_json(
                aside / RECORD,
                {
                    **read_record(first),
                    "base": chosen,
                    "kept_update": {file: share and asdict(share) for file, share in kept.items()},
                },
            )
    report = GGUFReport(
        path=Path(out_dir),
        files=reports[BASES[0]].files,
        kept_in_f16=reports[BASES[0]].kept_in_f16,
        kept_update=kept,
        seconds=sum(report.seconds for report in reports.values()),
    )
    return report, measured
