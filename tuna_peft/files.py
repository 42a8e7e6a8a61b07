"""Writes files so that a reader never sees half of one, and locks them. All of the package writes through this.

A file or a folder is written under a temporary name next to its place, flushed to disk and renamed. Its writer holds a
lock on it, so `remove_abandoned` can tell what a killed process has left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError, first_line

TEMPORARY = ".tmp"
"""The end of temporary names."""


@contextlib.contextmanager
def disk_full_is_a_user_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error during writing to `path` into a UserError if the disk is full or the file may not be larger.

    torch and safetensors raise their own error types without an errno, so with less than 1 MiB free any error counts.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or _free_bytes(path) < 1 << 20:
            fix = "Free some space and run the command again."
            raise UserError("the disk is full", where=str(path), fix=fix) from error
        if number == errno.EFBIG or "File too large" in str(error):
            fix = "Raise the limit (`ulimit -f unlimited`), or write to another file system."
            raise UserError("the file would be larger than is allowed here", where=str(path), fix=fix) from error
        raise


@contextlib.contextmanager
def unreadable_is_a_user_error(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns whatever a library raises while it reads `path` into a UserError that says these are not `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if found := wrong_content(path):
            raise UserError(f"this is {found[0]}", where=str(path), fix=found[1]) from error
        fix = "The file is damaged or of another kind: get it again."
        raise UserError(f"not readable as {what}: {first_line(error)}", where=str(path), fix=fix) from error


# How files begin that were downloaded in place of another, what they are, and what to do.
INSTEAD_OF_A_FILE = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "Get the file: `git lfs pull` in the clone."),
    (b"<!", "a web page", "Download the file itself: on the Hub its address has `resolve`, not `blob`."),
)


def wrong_content(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """What a file is that was downloaded in place of another, and what to do; None for other contents."""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        begin = stream.read(32)
        return next((found[1:] for found in INSTEAD_OF_A_FILE if begin.startswith(found[0])), None)
    return None


def _free_bytes(path: str | os.PathLike[str]) -> int:
    existing = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def temporary_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty directory next to `path`, and deletes it afterwards unless it was renamed."""
    beside = Path(path)
    beside.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(beside.parent, f".{beside.name}.*{TEMPORARY}")
    aside = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=TEMPORARY, dir=beside.parent))
    os.chmod(aside, 0o755)
    lock = os.open(aside, os.O_RDONLY)
    try:
        _mark_in_use(lock)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty directory next to `path`; it is renamed to `path` on success and deleted on failure.

    The earlier content of `path` is deleted only after the new directory is in place.
    """
    with temporary_directory(path) as aside, disk_full_is_a_user_error(path):
        yield aside
        replace_directory(aside, Path(path))


def replace_directory(aside: Path, final: Path) -> None:
    """Flushes `aside` to disk and renames it to `final`; after an interruption one of the two exists, whole."""
    flush_directory(aside)
    if final.exists():
        _exchange(aside, final)
    else:
        os.replace(aside, final)
    flush(final.parent)


def _exchange(aside: Path, final: Path) -> None:
    before = aside.with_name(f"{aside.name}.before{TEMPORARY}")
    os.replace(final, before)
    try:
        os.replace(aside, final)
    except BaseException:
        if not final.exists():
            os.replace(before, final)
        raise
    finally:
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)


def flush_directory(folder: Path) -> None:
    """Flushes all files in `folder` to disk, so that they outlive a power failure."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network drives do not flush folders
            raise
    finally:
        os.close(file)


def remove_abandoned(folder: Path, pattern: str = f"**/.*{TEMPORARY}") -> None:
    """Deletes temporary files and directories in `folder` whose writers have died."""
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(OSError):  # its writer holds the lock, or it was deleted with the directory around it
            file = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(file)


def _mark_in_use(file: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks; outputs may be there, runs may not
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a temporary file, flushes it to disk and renames it: readers see the old file or the new one, whole."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
    try:
        with disk_full_is_a_user_error(final):
            with open(aside, "wb") as out:
                _mark_in_use(out.fileno())
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(aside, final)
            flush(final.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically; ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Writes one JSON value per line, atomically; ValueError for NaN and infinity."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def take_lock(
    file: int, busy: str, *, where: str | os.PathLike[str], fix: str | None = None, holder: str = ""
) -> None:
    """Locks an open file or folder for this process until it is closed or the process ends, even by `kill -9`.

    Args:
        file: The file descriptor.
        busy: What to say when another process has the lock; its process id is added where it is known.
        where: The path to name in errors.
        fix: What to do when another process has the lock.
        holder: Its process id if the caller knows it; otherwise Linux is asked.

    Raises:
        UserError: Another process has the lock, or the file system has no locks.
    """
    try:
        # `flock`, which the kernel releases by itself. Not the package filelock: it names no process id, refuses links
        # and folders, and falls back to a file that stays behind when a process is killed.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            pid = holder or _lock_holder(file)
            raise UserError(f"{busy} (process {pid})" if pid else busy, where=str(where), fix=fix) from error
        raise UserError(
            f"cannot lock this: {error.strerror}",
            where=str(where),
            fix="Its file system has no file locks (a network drive?). Choose a folder on a local disk.",
        ) from error


def _lock_holder(file: int) -> str | None:
    """The process id that has the lock, from /proc/locks; None if it is not there (macOS, overlay file systems)."""
    status = os.fstat(file)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        # A line is "33: FLOCK  ADVISORY  WRITE 17434 fe:00:2146315 0 EOF"
        for words in map(str.split, Path("/proc/locks").read_text(encoding="ascii").splitlines()):
            if words[1] == "FLOCK" and words[5] == wanted:
                return words[4]
    return None


def sha256(path: str | os.PathLike[str]) -> str:
    """The hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
