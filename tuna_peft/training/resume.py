"""Finds the checkpoint to resume from, and damage in checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from tuna_peft.errors import UserError
from tuna_peft.models.stack.manifest import MANIFEST, read_manifest

logger = logging.getLogger("tuna_peft")

_STATE = "trainer_state.json"


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete and undamaged checkpoint in a trainer's output folder; None without any checkpoint.

    `trainer_state.json` is written last: a checkpoint without a readable one was interrupted, and is ignored.

    Raises:
        UserError: All complete checkpoints are damaged.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        try:
            json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if (damage := find_damage(path)) is None:
            if damaged:
                logger.warning("%s; resuming from %s", "; ".join(damaged), path.name)
            return path
        damaged.append(f"{path.name} is damaged: {damage}")
    if damaged:
        raise UserError(
            "; ".join(damaged), where=str(folder), fix="Delete these checkpoints: the training then begins anew."
        )
    return None


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a trainer's output folder, complete or not, newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]{1,18}", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def require_undamaged(checkpoint: str | os.PathLike[str]) -> None:
    """Raises UserError if training cannot be resumed from `checkpoint`."""
    path = Path(checkpoint)
    try:
        json.loads((path / _STATE).read_text(encoding="utf-8"))
        damage = find_damage(path)
    except (OSError, ValueError, RecursionError) as error:
        damage = f"{_STATE}: {error}"
    if damage:
        raise UserError(f"this checkpoint is damaged: {damage}", where=str(path), fix="Resume from an earlier one.")


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or damaged in a checkpoint whose writing was completed; None if nothing is."""
    if (checkpoint / MANIFEST).is_file():
        try:
            read_manifest(checkpoint)  # verifies the hashes of all adapters
        except UserError as error:
            return error.what
    elif (checkpoint / "adapter_config.json").is_file():  # the sum of the stack alone does not say what trains
        return f"{MANIFEST} is missing"
    elif not any(checkpoint.glob("*model*")):
        return "the weights are missing"
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    # Trainer would do without a missing file, and train on with other numbers. With `save_only_model` there is none.
    needed = ("scheduler.pt", "rng_state*.pth", *([] if list(checkpoint.glob("global_step*")) else ["optimizer.pt"]))
    missing = [name for name in needed if not list(checkpoint.glob(name))]
    if states and missing:
        return f"{missing[0]} is missing"
    for file in states:
        try:
            with zipfile.ZipFile(file) as archive:  # what `torch.save` writes; it has checksums
                broken = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            broken = str(error)
        if broken is not None:
            return f"{file.name} cannot be read ({broken})"
    return None
