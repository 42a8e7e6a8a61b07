"""The output directory of an export: checks before writing, resuming, and the record `tuna_export.json`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.files import disk_full_is_a_user_error, replace_directory, take_lock, write_json
from tuna_peft.models.stack.manifest import Manifest

RECORD = "tuna_export.json"
PLAN = "plan.json"


def write_record(folder: Path, kind: str, manifest: Manifest, **settings: Any) -> None:
    """Writes `tuna_export.json`: the source and settings of the export, which a later export may replace."""
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


@contextlib.contextmanager
def resumable_directory(out_dir: str | os.PathLike[str], plan: dict[str, Any]) -> Iterator[Path]:
    """Yields a directory beside `out_dir` that becomes `out_dir` on success and outlives an interruption.

    It holds `plan`. Where one with the same plan is left of an interrupted process, that one is yielded as it is; one
    with another plan is emptied. A mistake of the user (`UserError`) would only come again: it deletes the directory.

    Raises:
        UserError: Another process is writing there, or the disk is full (then the directory stays).
    """
    final = Path(out_dir)
    aside = partial_directory(final)
    aside.mkdir(parents=True, exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        take_lock(lock, "another process is writing this export", where=final, fix="Wait for it to end.")
        with disk_full_is_a_user_error(final):
            if not _has_plan(aside, plan):
                for entry in aside.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                write_json(aside / PLAN, plan)
            try:
                yield aside
            except UserError:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            (aside / PLAN).unlink()
            replace_directory(aside, final)
    finally:
        os.close(lock)


def partial_directory(out_dir: str | os.PathLike[str]) -> Path:
    """The directory in which `resumable_directory` keeps an unfinished export."""
    final = Path(out_dir).absolute()
    return final.with_name(f".{final.name}.partial")


def _has_plan(aside: Path, plan: dict[str, Any]) -> bool:
    try:
        return json.loads((aside / PLAN).read_text(encoding="utf-8")) == plan
    except (FileNotFoundError, ValueError):
        return False


def require_space(out_dir: str | os.PathLike[str], needed: int) -> None:
    """Checks that `needed` bytes are free where `out_dir` will be, before anything is written.

    What an interrupted export has written there counts as free, because it is reused or deleted.

    Raises:
        UserError: Not enough space is free.
    """
    existing = next(path for path in Path(out_dir).resolve().parents if path.exists())
    partial = partial_directory(out_dir)
    free = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in partial.glob("*") if file.is_file())
    if free < needed:
        raise UserError(
            f"not enough disk space: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free",
            where=str(existing),
            fix="Free some space or choose another output directory.",
        )


def mean_and_max(errors: Mapping[str, float]) -> dict[str, float] | None:
    """Mean and maximum of the modules' errors; None without any."""
    return {"mean": sum(errors.values()) / len(errors), "max": max(errors.values())} if errors else None
