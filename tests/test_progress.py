"""The progress of long work: a live bar on a terminal, plain lines elsewhere, and no carriage return in any log."""

from __future__ import annotations

import ast
import fcntl
import logging
import os
import pty
import select
import struct
import termios
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from tuna_peft import progress
from tuna_peft.progress import INTERVAL, Progress, tracked
from tuna_peft.terminal import log_handler

PACKAGE = Path(__file__).parents[1] / "tuna_peft"


@pytest.fixture
def clock(monkeypatch):
    """Seconds, moved by hand."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


class Screen:
    """A terminal of 80 columns."""

    def __init__(self):
        self._outside, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.stream = os.fdopen(inside, "w")

    def shown(self):
        """All that was written."""
        self.stream.flush()
        found = b""
        while select.select([self._outside], [], [], 0.2)[0]:
            found += os.read(self._outside, 4096)
        return found.decode().replace("\r\n", "\n")

    def close(self):
        self.stream.close()
        os.close(self._outside)


@pytest.fixture
def screen():
    """To be put in the place of standard error inside of a test: pytest replaces it before each."""
    terminal = Screen()
    yield terminal
    terminal.close()


def test_without_a_terminal_a_line_comes_after_each_interval(clock, capsys):
    with Progress("sft", 100, "steps", done=40) as work:
        for _ in range(30):
            clock[0] += INTERVAL / 10
            work.update(loss="0.500")
    lines = capsys.readouterr().err.splitlines()
    # After 30 s 10 of the 60 left are done, so 50 more take 150 s.
    assert lines[0] == "sft: 50% (50/100 steps) 02:30 left, loss 0.500"
    assert lines[2] == "sft: 70% (70/100 steps) 01:30 left, loss 0.500"
    assert lines[3:] == ["sft: 70% (70/100 steps) in 01:30, loss 0.500"]


def test_short_work_says_nothing(clock, capsys):
    assert list(tracked("abc", "reading", "records")) == ["a", "b", "c"]
    clock[0] += INTERVAL
    with Progress("reading", 0, "records"):
        pass
    assert capsys.readouterr() == ("", "")


def test_what_is_kept_ends_with_a_line(clock, capsys):
    with pytest.raises(ZeroDivisionError), Progress("sft", 10, "steps", keep=True) as work:
        work.update(3)
        raise ZeroDivisionError
    assert capsys.readouterr().err == "sft: 30% (3/10 steps) in 00:00\n"


def test_bytes_have_a_unit(clock, capsys):
    with Progress("merging", 3_000_000_000, "B") as work:
        clock[0] += INTERVAL
        work.update(1_500_000_000)
    assert capsys.readouterr().err.splitlines()[0] == "merging: 50% (1.50G/3.00G B) 00:30 left"


def test_a_name_cannot_hold_carriage_returns(clock, capsys):
    with Progress("a\rb\x1b[2J", 1, "steps", keep=True) as work:
        work.update()
    assert capsys.readouterr().err == "a\ufffdb\ufffd[2J: 100% (1/1 steps) in 00:00\n"


def test_the_bar_fits_80_columns(screen):
    with redirect_stderr(screen.stream), Progress("superni-2shot (probabilistic)", 1234, "prompts", keep=True) as work:
        for _ in range(12):
            work.update(100, loss="12.345", accuracy="0.678", margin="0.123")
            work._bar.refresh()
    frames = [frame for frame in screen.shown().split("\r") if frame.strip()]
    assert frames and all(len(frame.rstrip("\n").replace("\x1b[A", "")) <= 80 for frame in frames)
    assert "1200/1234" in frames[-1] and "loss 12.345" in frames[-1]


def test_messages_are_printed_above_the_bar(screen):
    logger = logging.getLogger("tuna_peft")
    with redirect_stderr(screen.stream):
        handler = log_handler()
    logger.addHandler(handler)
    try:
        with redirect_stderr(screen.stream), Progress("sft", 2, "steps", keep=True) as work:
            work.update()
            work._bar.refresh()
            logger.warning("out of memory")
            work.update()
            work._bar.refresh()
    finally:
        logger.removeHandler(handler)
    lines = screen.shown().split("\n")
    assert lines[0].endswith("\rout of memory")  # the bar was wiped off the line first
    assert "2/2" in lines[1]


def test_it_can_be_switched_off(clock, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as in all processes of a run but the first
    with Progress("sft", 1, "steps", keep=True) as work:
        clock[0] += INTERVAL
        work.update()
    assert capsys.readouterr().err == ""


def test_no_other_module_draws_bars():
    users = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tqdm"):
                users.append(file.name)
    assert set(users) == {"progress.py", "terminal.py"}
