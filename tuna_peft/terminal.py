"""Everything that the package prints passes through here, so that no text can give orders to the terminal.

Data, model output, recipes and answers of servers may hold escape sequences: they can hide text, change the title, and
in some terminals type commands. Control characters and characters that change the direction of text
(https://trojansource.codes) are printed as U+FFFD; so are halves of surrogate pairs, which cannot be encoded.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` with every character that a terminal would obey, except tab and newline, replaced by U+FFFD."""
    return _UNSAFE.sub("\ufffd", text)


def echo(message: object, *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Prints cleaned text; `style` as in `typer.secho`, for example `fg="red"`."""
    typer.secho(clean(str(message)), nl=nl, err=err, **style)


def console(**options: Any) -> Console:
    """A `rich` console whose output is cleaned; its own colors are added afterwards."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, *arguments: Any, **keywords: Any) -> Any:
            for text, style, control in super().render(*arguments, **keywords):
                yield Segment(text if control else clean(text), style, control)

    return CleanConsole(markup=False, **options)


class CleanFormatter(logging.Formatter):
    """A formatter of log records whose lines are cleaned, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


class _AboveTheBar(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def log_handler() -> logging.Handler:
    """A handler that prints log records from INFO on to standard error, above a progress bar if there is one.

    Records of DEBUG are for `run.log` alone.
    """
    handler = _AboveTheBar()
    handler.setLevel(logging.INFO)
    handler.setFormatter(CleanFormatter())
    return handler
