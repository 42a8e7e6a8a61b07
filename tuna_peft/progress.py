"""How far long work has come: a live bar on a terminal, elsewhere one plain line at most every 30 seconds.

All long work of the package reports here: reading, training, generation, scoring, judging, evaluation and exports.
`TQDM_DISABLE=1` switches both off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sized
from time import monotonic
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm

from tuna_peft.terminal import clean, echo

Item = TypeVar("Item")
logger = logging.getLogger("tuna_peft")

INTERVAL = 30.0
"""Seconds between two lines."""

_LONGEST_NAME = 30
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
_COUNT = "{desc} {n_fmt} {unit} after {elapsed}{postfix}"


class Progress:
    """Progress of one piece of work; use it as a context manager, or call `close`.

    The bar appears after two seconds. A log file (`run.log`) gets the plain lines in either case.

    Args:
        name: What is being done, for example `sampling (sft)`.
        total: Number of items; None if it is not known before the end.
        unit: What the items are, for example `prompts`; `B` for bytes.
        done: Items that an earlier run has done.
        keep: Leave the bar on the screen, and end with a line in any case.
        off: Show nothing.
    """

    def __init__(
        self, name: str, total: int | None, unit: str, *, done: int = 0, keep: bool = False, off: bool = False
    ) -> None:
        self.name, self.total, self.unit, self.keep = clean(name)[:_LONGEST_NAME], total, unit, keep
        self._done, self._before, self._numbers = done, done, ""
        self._began = self._last = monotonic()
        self._off, self._lines, self._open = off or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"), 0, True
        self._bar = tqdm(
            total=total, initial=done, desc=self.name, unit=unit, bar_format=_COUNT if total is None else _BAR,
            leave=keep, unit_scale=unit == "B",
            delay=0.001 if keep else 2, dynamic_ncols=True, disable=self._off or None,
        )  # fmt: skip

    def update(self, by: int = 1, **numbers: str) -> None:
        """Adds `by` finished items, and shows `numbers`, for example `loss="0.812"`."""
        self._done += by
        if numbers:
            self.show(**numbers)
        self._bar.update(by)
        if not self._off and self._done != self.total and monotonic() - self._last >= INTERVAL:
            self._line()

    def show(self, **numbers: str) -> None:
        """Shows other `numbers` from now on."""
        self._numbers = " ".join(f"{name} {value}" for name, value in numbers.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(self._numbers, refresh=False)

    def close(self) -> None:
        """Ends the bar; later output starts on a new line."""
        if self._open and not self._off and (self.keep or self._lines or monotonic() - self._last >= INTERVAL):
            self._line(last=True)
        self._bar.close()
        self._open = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _line(self, *, last: bool = False) -> None:
        self._last = monotonic()
        passed = self._last - self._began
        share = f"{self._amount(self._done)} {self.unit}"
        if self.total is not None:
            counts = f"{self._amount(self._done)}/{self._amount(self.total)} {self.unit}"
            share = f"{self._done / max(self.total, 1):.0%} ({counts})"
        if last:
            time = f"in {_clock(passed)}"
        elif self.total is not None and (speed := (self._done - self._before) / max(passed, 1e-9)):
            time = f"{_clock(max(self.total - self._done, 0) / speed)} left"
        else:
            time = f"after {_clock(passed)}"
        line = f"{self.name}: {share} {time}" + (f", {self._numbers}" if self._numbers else "")
        self._lines += 1
        logger.debug(line)
        if self._bar.disable:
            echo(line, err=True)

    def _amount(self, count: int) -> str:
        return plain_tqdm.format_sizeof(count) if self.unit == "B" else f"{count:,}"


def tracked(items: Iterable[Item], name: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yields `items` and shows how many were taken.

    Args:
        total: Their number, if `items` has no length and it is known.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


def _clock(seconds: float) -> str:
    return plain_tqdm.format_interval(seconds)
