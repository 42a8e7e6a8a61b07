"""Turns the errors of commands into messages and exit codes."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from tuna_peft.errors import UserError
from tuna_peft.terminal import CleanFormatter, echo

# The base class of the parser's errors. Newer typer releases bundle click, older ones depend on it; this works with
# both.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


TRAIN, DATA, FEEDBACK, RESULTS, EXPORT, MACHINE = PANELS = (
    "Train", "Data", "Feedback: where ranks come from", "Results", "Export", "Machine",
)  # fmt: skip
"""The headings of `--help`, in order."""

MAX_MESSAGE = 4000
"""Characters. A longer message quotes data, such as a key of a megabyte."""


class ErrorReportingGroup(TyperGroup):
    """The top-level group. Exit codes: 2 for the user's mistakes, 130 after Ctrl-C, 1 for everything else.

    `--debug`, before or after the command, also shows the traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the headings; typer puts groups of commands after all single ones."""
        return sorted(self.commands, key=lambda name: PANELS.index(self.commands[name].rich_help_panel))  # type: ignore[attr-defined]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for i, arg in enumerate(args) if i >= end or arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        if logging.lastResort:  # prints warnings where a command sets up no handler
            logging.lastResort.setFormatter(CleanFormatter())
        if not debug:
            # On import it prints a long warning that an optional, faster CPU kernel is not installed.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            # Libraries warn about each other's future releases; a user cannot do anything about that.
            warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _UsageError, BrokenPipeError):
            raise
        except KeyboardInterrupt as interrupt:
            again = (
                " Run the same command again to resume."
                if ctx.invoked_subcommand in ("run", "evaluate", "merge", "sample", "score", "judge")
                else ""
            )
            echo(f"\nInterrupted.{again}", err=True)
            raise typer.Exit(130) from interrupt
        except Exception as error:
            if debug:
                echo(traceback.format_exc(), err=True, nl=False)
            message, code = describe_error(error)
            echo("error: ", fg="red", bold=True, nl=False, err=True)
            echo(message if debug or code == 2 else f"{message}\n  Run it with --debug for the traceback.", err=True)
            raise typer.Exit(code) from error


def describe_error(error: Exception) -> tuple[str, int]:
    """The message for the terminal and the exit code."""
    if isinstance(error, UserError):
        message = str(error)
        return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ...", 2
    if is_disk_full(error):
        return "the disk is full\n  Free some space and run the command again.", 2
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)[:MAX_MESSAGE]}: {error.strerror}\n  Check the path and its permissions.", 2
    lines = str(error).strip().splitlines()
    if is_out_of_memory(error):
        what = lines[0].partition(" GPU ")[0] if lines else "out of memory"
        return (
            f"the GPU's memory is full ({what})\n"
            "  `tuna-peft plan RECIPE` says what saves memory; in a supervised stage, halve\n"
            "  per_device_train_batch_size and double gradient_accumulation_steps."
        ), 2
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}", 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU ran out of memory. Does not import torch: without it there is no such error."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or one of its causes, is a full disk. safetensors and Arrow only say so in their text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
