"""The journal: an append-only cache file of answers that cost money or hours, keyed by a hash of the question.

One JSON object per line, `{"key": ..., "value": ...}`, in ASCII, which preserves any text, even control characters and
lone surrogates. Sampling, scoring, judging and evaluation use it: after a restart only the missing keys are computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.files import disk_full_is_a_user_error, flush, take_lock

logger = logging.getLogger(__name__)

# Beginning of the keys of choices, see `Journal.settle`; other keys are hexadecimal.
_CHOICE = "choice:"
_LONGEST = 1 << 40  # bytes, more than any line has
SYNC_SECONDS = 1.0
"""Seconds between flushes to disk: the most that is lost when the machine fails. A killed process loses nothing."""


def content_key(**parts: Any) -> str:
    """The key of a question: a hash of everything that its answer depends on.

    Args:
        parts: JSON values. The order of names does not matter, also inside objects; 1 and 1.0 differ.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]


class Journal:
    """Answers by key, written to the file as soon as they are added; thread-safe within one process.

    Memory holds only the keys; values are read from the file. The first record of a key is the one that counts. It
    never changes, so results that were computed from it stay valid.

    Args:
        path: A .jsonl file; it is created if it does not exist.

    Raises:
        UserError: Another process has it open, or the file is not a journal.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._guard = threading.Lock()
        self._places: dict[str, int] = {}  # key -> offset * _LONGEST + length of its line; a tuple takes more
        self._end, self._synced = 0, time.monotonic()
        try:
            busy, fix = "the journal is in use by another process", "Wait for it to end, or choose another journal."
            take_lock(self._file, busy, where=self.path, fix=fix)
            flush(self.path.parent)  # the file may be new
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return sum(1 for _ in self)  # `list` would ask for the length

    def __iter__(self) -> Iterator[str]:
        """The keys of all answers, in the order in which they were added."""
        return iter([key for key in self._places if not key.startswith(_CHOICE)])

    def __getitem__(self, key: str) -> Any:
        """The value for `key`, a new copy each time; KeyError if there is none."""
        offset, length = divmod(self._places[key], _LONGEST)
        return json.loads(os.pread(self._file, length, offset))["value"]

    def add(self, key: str, value: Any) -> None:
        """Appends a record; after the return it is safe even if this process is killed.

        Args:
            key: See `content_key`.
            value: A JSON value.

        Raises:
            KeyError: The key has a value already.
            UserError: The disk is full; earlier records are intact.
        """
        line = json.dumps({"key": key, "value": value}, allow_nan=False).encode("ascii") + b"\n"
        with self._guard:
            if key in self._places:
                raise KeyError(f"{self.path} has a value for {key} already")
            self._append(line)
            self._places[key] = self._end * _LONGEST + len(line)
            self._end += len(line)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()

    def settle(self, name: str, value: Any, *, before: Any) -> Any:
        """The value of a choice that depends on the machine and not on the question, such as a batch size.

        It is fixed when the journal is begun, because another choice would round differently from the answers that
        are there.

        Args:
            name: Name of the choice.
            value: Its value, if it is made now.
            before: Its value if the journal has answers, but no such choice: earlier versions did not record it.
        """
        key = _CHOICE + name
        if key not in self:
            self.add(key, before if len(self) else value)
        return self[key]

    def close(self) -> None:
        """Flushes to disk, closes the file and releases the lock; can be called again."""
        with self._guard:
            if self._file >= 0:
                self._sync()
                os.close(self._file)
                self._file = -1

    def _append(self, line: bytes) -> None:
        written = 0
        try:
            with disk_full_is_a_user_error(self.path):
                while written < len(line):
                    written += os.pwrite(self._file, line[written:], self._end + written)
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def _read(self) -> None:
        """Reads the keys, and removes an incomplete last line, which a killed process leaves behind."""
        bad: list[int] = []
        with open(self.path, "rb") as source:
            for number, line in enumerate(source, 1):
                key = _key_of(line)
                if key is not None:
                    self._places.setdefault(key, self._end * _LONGEST + len(line))
                elif line.endswith(b"\n"):
                    bad.append(number)
                else:
                    break
                self._end += len(line)
        if bad and not self._places:
            raise UserError(
                "this is not a journal: none of its lines is a record",
                where=str(self.path),
                fix="Give the path of a new file, or of the journal of an earlier run.",
            )
        if bad:
            logger.warning(
                "%s: %d lines are damaged (the first is line %d); their answers are computed again",
                self.path, len(bad), bad[0],
            )  # fmt: skip
        torn = os.path.getsize(self.path) - self._end
        if torn and not self._places:
            # One line without an end: our first record, incomplete, or another kind of file, which must stay as it is.
            start = os.pread(self._file, 9, 0)
            if not b'{"key": "'.startswith(start[:9]):
                raise UserError("this is not a journal", where=str(self.path), fix="Give the path of a new file.")
        os.ftruncate(self._file, self._end)


def _key_of(line: bytes) -> str | None:
    """The key of a complete record, otherwise None. An incomplete record is never valid JSON."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.keys() != {"key", "value"} or not isinstance(record["key"], str):
        return None
    return record["key"]
