"""Locks that die with their process, and errors that say who has one or why there is none."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from tuna_peft.errors import UserError
from tuna_peft.files import take_lock

HOLD = """
import os, sys
from tuna_peft.files import take_lock
take_lock(os.open(sys.argv[1], os.O_RDONLY), "busy", where="here")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def target(tmp_path):
    """A file, opened."""
    (tmp_path / "file").touch()
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def hold(path):
    """A process that has the lock on `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


def refused(target, **arguments):
    with pytest.raises(UserError) as error:
        take_lock(target, "busy", where="there", fix="wait", **arguments)
    return error.value


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_lock_ends_with_its_process(target, tmp_path, how):
    process = hold(tmp_path / "file")
    error = refused(target)
    assert (error.where, error.fix) == ("there", "wait")
    # Overlay file systems, as in containers, do not tell which process it is; another one must not be named.
    assert error.what in (f"busy (process {process.pid})", "busy")
    assert refused(target, holder="12").what == "busy (process 12)"
    process.send_signal(how)
    process.communicate()
    take_lock(target, "busy", where="there")


def test_the_process_is_the_one_that_linux_lists(target, monkeypatch, tmp_path):
    status = os.fstat(target)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    listed = tmp_path / "locks"
    listed.write_text(
        f"1: FLOCK  ADVISORY  WRITE 11 {device}:{status.st_ino}1 0 EOF\n"
        f"2: POSIX  ADVISORY  WRITE 12 {device}:{status.st_ino} 0 EOF\n"
        f"2: -> FLOCK  ADVISORY  WRITE 13 {device}:{status.st_ino} 0 EOF\n"
        f"3: FLOCK  ADVISORY  WRITE 14 {device}:{status.st_ino} 0 EOF\n"
    )
    monkeypatch.setattr("tuna_peft.files.Path", lambda path: listed)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(BlockingIOError(errno.EAGAIN, "busy")))
    assert refused(target).what == "busy (process 14)"
    listed.unlink()
    assert refused(target).what == "busy"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_another_process(target, monkeypatch, number):
    def no_locks(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    error = refused(target)
    assert error.what == f"cannot lock this: {os.strerror(number)}"
    assert "network drive" in error.fix
