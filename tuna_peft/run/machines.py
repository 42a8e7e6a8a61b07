"""Runs on several machines: copies of the run's results where its folder is not shared, and the check of the data.

`tuna_peft.run.folder` uses `FolderCopies`; `tuna_peft.run.pipeline` calls `require_same_data`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from datasets import Dataset

from tuna_peft.errors import UserError
from tuna_peft.files import TEMPORARY
from tuna_peft.journal import content_key
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.inputs import Inputs
from tuna_peft.run.processes import Processes
from tuna_peft.training.resume import latest_checkpoint

MARK = ".copy"
"""In a copy of a run's folder."""

_TOKEN_AT = 20  # place in the lock file, behind the process id
_CHUNK, _ROWS = 64 << 20, 1000  # bytes and rows at a time
# What all processes read: at any time, and only when a run is resumed.
_SMALL = ("*.json", "stages/*/feedback.json", "stages/*/ranked.jsonl")
_RESUMED = ("recipe.yaml", "stages/*/done.json", "stack/**/*")


class FolderCopies:
    """Copies of the results in a run's folder on the machines that do not see it; only the first machine's counts.

    Checkpoints are written by the first process, apart from the states of random numbers of the others, which stay
    where they are.

    Args:
        folder: The path of the run's folder on this machine.
        processes: The processes of the run; all of them create this object and call `update`.
        lock: In the first process: the locked file `.lock` in the folder.

    Raises:
        UserError: The path has other files on a machine that does not see the run's folder.
    """

    def __init__(self, folder: Path, processes: Processes, lock: int | None) -> None:
        self._folder, self._processes = folder, processes
        self._sent: dict[str, tuple[int, int]] = {}
        if processes.machines == 1:
            self._needed = self._writes = False
            processes.wait()
            return
        token = processes.of_main(uuid4().bytes)
        if lock is not None:
            os.pwrite(lock, token, _TOKEN_AT)
            os.fsync(lock)
        processes.wait()
        blind = not _reads(folder / ".lock", token)
        self._needed = any(processes.of_all(blind))
        self._writes = blind and processes.first_of_machine
        if self._writes:
            _clear(folder)
        if self._needed:
            self.update(resumed=True)

    def update(self, *, resumed: bool = False) -> None:
        """Copies what is new since the last call; `resumed` copies all that a resumed run needs."""
        if not self._needed:
            return
        names = self._processes.of_main(self._new(resumed) if self._processes.main else None)
        for name in names:
            self._copy(name)
        self._processes.wait()

    def _new(self, resumed: bool) -> list[str]:
        patterns = [*_SMALL, *(_RESUMED if resumed else ())]
        found = {path for pattern in patterns for path in self._folder.glob(pattern) if path.is_file()}
        for stage in self._folder.glob("stages/*") if resumed else ():
            if not (stage / "done.json").exists() and (checkpoint := latest_checkpoint(stage)) is not None:
                found |= {path for path in checkpoint.rglob("*") if path.is_file()}
        new = []
        for path in sorted(found):
            name, status = str(path.relative_to(self._folder)), path.stat()
            if self._sent.get(name) != (version := (status.st_mtime_ns, status.st_size)):
                self._sent[name] = version
                new.append(name)
        return new

    def _copy(self, name: str) -> None:
        """Sends a file in chunks; a machine that does not see it writes it under a temporary name first."""
        path = self._folder / name
        aside = path.with_name(f".{path.name}{TEMPORARY}")
        with contextlib.ExitStack() as files:
            source = files.enter_context(open(path, "rb")) if self._processes.main else None
            if self._writes:
                path.parent.mkdir(parents=True, exist_ok=True)
            target = files.enter_context(open(aside, "wb")) if self._writes else None
            while chunk := self._processes.of_main(source.read(_CHUNK) if source else None):
                if target:
                    target.write(chunk)
        if self._writes:
            os.replace(aside, path)


def refuse_copy(folder: Path) -> None:
    """Raises UserError if `folder` is a copy, which lacks journals and evaluations."""
    if (folder / MARK).exists():
        raise UserError(
            "this is the copy of a run's folder on a machine that was not the first one",
            where=str(folder),
            fix=f"Resume on the machine with the original, choose another --output, or delete {folder / MARK} to "
            "continue from the copy.",
        )


def _reads(file: Path, token: bytes) -> bool:
    return file.is_file() and file.read_bytes()[_TOKEN_AT:].startswith(token)


def _clear(folder: Path) -> None:
    """Makes `folder` an empty copy; the states of random numbers in checkpoints stay."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    if files and not (folder / MARK).exists():
        raise UserError(
            f"{platform.node()} does not see the run's folder of the first machine, and this path has files on it",
            where=str(folder),
            fix="Delete them, choose another --output, or give a folder that all machines share.",
        )
    for path in files:
        if not path.name.startswith("rng_state"):
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def require_same_data(processes: Processes, recipe: Recipe, inputs: Inputs) -> None:
    """Raises UserError if the machines of a run have read different recipes or different data."""
    if processes.machines == 1:
        return
    # Without paths, which may differ between machines.
    left_out: Any = {"base": {"model"}, "evaluation": True, "export": True, "stages": {"__all__": {"data"}}}
    mine = {"recipes": content_key(recipe=recipe.model_dump(mode="json", exclude=left_out))}
    for name, rows in inputs.stages.items():
        mine[f"data for the stage {name}"] = _digest(rows)
    for name, prompts in inputs.prompts.items():
        mine[f"prompts for the stage {name}"] = content_key(prompts=[row["prompt"] for row in prompts])
    for machine, theirs in processes.of_all((platform.node(), mine)):
        if differing := [name for name, digest in mine.items() if theirs.get(name) != digest]:
            raise UserError(
                f"{platform.node()} and {machine} have read different {differing[0]}",
                fix="Give all machines the same files, and the same revisions of data sets on the Hub.",
            )


def _digest(rows: Dataset) -> str:
    """A hash of all rows."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(_ROWS):
        with pa.ipc.new_stream(sink := pa.BufferOutputStream(), table.schema.remove_metadata()) as stream:
            stream.write_table(table.combine_chunks().replace_schema_metadata())
        digest.update(sink.getvalue())
    return digest.hexdigest()
