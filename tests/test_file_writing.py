"""Errors of the disk by their number, and what killed writers leave behind."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from tuna_peft import files
from tuna_peft.errors import UserError
from tuna_peft.files import disk_full_is_a_user_error, remove_abandoned


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "larger than is allowed"),
        (errno.EIO, None),
        (errno.EACCES, None),
    ],
)
def test_errors_of_the_disk(tmp_path, monkeypatch, number, says):
    monkeypatch.setattr(files, "_free_bytes", lambda path: 1 << 40)
    kind = OSError if says is None else UserError
    with pytest.raises(kind, match=says) as caught, disk_full_is_a_user_error(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is (UserError if says else type(OSError(number, "")))


@pytest.mark.parametrize(("free", "kind"), [((1 << 20) - 1, UserError), (1 << 20, RuntimeError)])
def test_errors_of_libraries_count_when_little_is_free(tmp_path, monkeypatch, free, kind):
    monkeypatch.setattr(files, "_free_bytes", lambda path: free)
    with pytest.raises(kind), disk_full_is_a_user_error(tmp_path / "x"):
        raise RuntimeError("write failed")


def test_files_and_folders_of_dead_writers_are_removed_and_those_of_living_ones_stay(tmp_path):
    for name in (".dead.1.tmp", ".living.2.tmp", "other.tmp", "kept"):
        (tmp_path / name).touch()
    (tmp_path / ".dead.abc.tmp" / "inside").mkdir(parents=True)
    (tmp_path / ".dead.abc.tmp" / "inside" / "file").touch()
    (tmp_path / ".living.abc.tmp").mkdir()
    held = [os.open(tmp_path / name, os.O_RDONLY) for name in (".living.2.tmp", ".living.abc.tmp")]
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".living.2.tmp", ".living.abc.tmp", "kept", "other.tmp"]
    for file in held:
        os.close(file)
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["kept", "other.tmp"]
