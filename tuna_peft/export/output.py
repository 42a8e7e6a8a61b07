"""The directory of an export: what it may replace, what it needs, and the record that marks it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.files import write_json
from tuna_peft.models.manifest import Manifest

RECORD = "tuna_export.json"


def write_record(folder: Path, kind: str, manifest: Manifest, **settings: Any) -> None:
    """Writes `tuna_export.json`: what the export was made of; a later export may replace a folder that has it."""
    write_json(folder / RECORD, {"kind": kind, **settings, "stack": asdict(manifest)})


def require_replaceable(out_dir: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuses an output directory whose replacement would delete anything but an earlier export.

    Raises:
        UserError: It is or contains an input, is a file, or holds other files.
    """
    out = Path(out_dir).resolve()
    for path in inputs:
        if Path(path).resolve().is_relative_to(out):
            raise UserError(f"writing to {out_dir} would delete {path}", fix="Choose another output directory.")
    if not out.exists() or (out / RECORD).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(
            "exists and was not written by an export",
            where=str(out_dir),
            fix="Choose a new or empty output directory.",
        )


def require_space(out_dir: str | os.PathLike[str], needed: int) -> None:
    """Checks that `needed` bytes are free where `out_dir` will be, before anything is written.

    Raises:
        UserError: They are not.
    """
    existing = next(path for path in Path(out_dir).resolve().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"not enough disk space: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free",
            where=str(existing),
            fix="Free some space or choose another output directory.",
        )


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held since its start, in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
