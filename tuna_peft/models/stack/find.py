"""Finds the files of a stack: in a folder, in a run's folder, or on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from tuna_peft.errors import UserError
from tuna_peft.models.stack.manifest import ADAPTER_FILES, MANIFEST

# Files to download: without the combined adapter that a published stack has at its root.
_FILES = [MANIFEST, f"stack/{MANIFEST}", *(f"*/{name}" for name in ADAPTER_FILES)]


def find_stack(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder that holds `stack.json`.

    Args:
        name: That folder; a folder that has it in `stack/` (a run, a published stack); or a Hub id, which is
            downloaded or found in the cache. Anything else is returned unchanged: `read_manifest` reports the error.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: The Hub has no such repository, or it cannot be reached.
    """
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=_FILES))
        except (OSError, ValueError) as error:
            raise UserError(
                f"there is no such folder, and downloading it from the Hub failed: {str(error).splitlines()[0]}",
                where=str(name),
                fix="Check the path or Hub id; for a gated or private repository run `hf auth login` first.",
            ) from error
    if (folder / MANIFEST).is_file():
        return folder
    inside = folder / "stack"
    return inside if (inside / MANIFEST).is_file() else folder
