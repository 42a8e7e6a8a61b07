"""Runs generated bad inputs through the command line, in this process: `make fuzz`.

Each input ends in one class: `clear` (exit code 2 with a message), `accepted` (with the reason why that may be right),
`accepted though wrong`, `traceback` (any other error, or exit code 1) and `hang`. The last three are failures.
The same seed makes the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzz_inputs import GENERATORS, Case

CPU_SECONDS, SECONDS = 10, 600
"""Limits of one input: of the processor, which other work on the machine does not use up, and of the clock."""

FAILURES = ("accepted though wrong", "traceback", "hang")


class Hang(BaseException):
    """The input took too long; not an Exception, so that no handler takes it for an error of a library."""


def length_of_response(record: dict[str, Any], response: str) -> float:
    """The judge of the inputs that need one."""
    return float(len(response))


def fuzz(count: int, seed: int) -> tuple[Counter[str], list[tuple[str, str, str]]]:
    """Runs `count` inputs.

    Returns:
        The number of inputs by class; `(class, what, detail)` for every input that is not `clear`.
    """
    # Imported before the clock of an input runs: they take seconds.
    import datasets  # noqa: F401

    import tuna_peft.export.combine
    import tuna_peft.feedback.judge
    import tuna_peft.run.dry_run  # noqa: F401

    classes: Counter[str] = Counter()
    notes: list[tuple[str, str, str]] = []
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        generator = GENERATORS[number % len(GENERATORS)]
        with _empty_folder() as folder:
            case = generator(draw, folder)
            found, detail = run_case(case)
        classes[found] += 1
        if found in FAILURES:
            print(f"{found}: {number}: {generator.__name__}: {case.what!r}\n  {detail!r}", flush=True)
        if found != "clear":
            notes.append((found, f"{number}: {generator.__name__}: {case.what}", detail))
    return classes, notes


def run_case(case: Case) -> tuple[str, str]:
    """The class of an input, and what was printed or why it may be accepted."""
    from typer.testing import CliRunner

    from tuna_peft.cli.app import app

    try:
        with _limits():
            result = CliRunner().invoke(app, case.command)
    except Hang:
        return "hang", " ".join(case.command)
    if isinstance(result.exception, Hang):
        return "hang", " ".join(case.command)
    said = result.stderr.strip()
    if result.exit_code == 0:
        return ("accepted", case.may_pass) if case.may_pass else ("accepted though wrong", result.stdout[:200])
    if result.exit_code == 2 and said and "Traceback" not in said:
        return "clear", said
    return "traceback", f"exit {result.exit_code}: {said[:300]} {result.exception!r:.200}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _empty_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="tuna-peft-fuzz-") as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def main() -> int:
    """Prints the classes, every failure, and the reasons of what was accepted; exit code 1 for failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="also list every accepted input")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    start = time.monotonic()
    classes, notes = fuzz(options.count, options.seed)
    for found in ("clear", "accepted", *FAILURES):
        print(f"{found:<22}{classes[found]:>6}")
    for found, what, detail in notes:
        if options.list:
            print(f"{found}: {what!r}\n  {detail!r}")
    for (generator, reason), count in sorted(
        Counter((what.split(": ")[1], detail) for found, what, detail in notes if found == "accepted").items()
    ):
        print(f"accepted: {count:>4} of {generator}: {reason}")
    print(f"{options.count} inputs, seed {options.seed}, {time.monotonic() - start:.0f} s")
    return 1 if any(classes[found] for found in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
