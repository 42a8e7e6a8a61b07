"""Measures everything that needs a GPU: `python -m benchmarks.gpu --out DIR`.

The steps (`benchmarks.gpu.steps`) run in order of importance, each in its own process with its own time limit. Results
are in DIR/gpu.json after every arm, the output of all processes is in DIR/gpu.log. An arm that fails leaves its error
in the file, and the next one runs. The same command again measures what is missing or failed.

    python -m benchmarks.gpu --out DIR --toy      # a trial: the same code with a tiny model, on a CPU too
    python -m benchmarks.report DIR/gpu.json      # the ranking steps and the goals
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.record import ERROR, Record
from benchmarks.gpu.steps import STEPS, Step, measure

TEN_MINUTES = 600.0
_AS_USERS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as the command line sets it
LEAST = 5.0  # seconds without which no process is started


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 1 if an arm is missing or failed."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out)
    if options.only:
        return measure(options.only, record, toy=options.toy)
    if not options.toy and not _has_gpu():
        print("no GPU that PyTorch can use; --toy tries the command on a CPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    for step in STEPS.values():
        record.forget(step.name, failures_only=step.name not in options.again)
    for step in STEPS.values():
        limit = step.seconds * 60 * options.minutes / TEN_MINUTES
        _run(step, record, min(time.monotonic() + limit, deadline), toy=options.toy)
    return _summary(record)


def _run(step: Step, record: Record, deadline: float, *, toy: bool) -> None:
    """Starts processes until one has gone through all arms: after a crash, another one measures the rest."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(record.file.parent), "--only", step.name]
    while (left := deadline - time.monotonic()) > LEAST:
        before = len(record.arms(step.name))
        code, output = _process([*command, "--toy"] if toy else command, record.file.with_suffix(".log"), left)
        if code == 0:
            return
        if code is not None and len(record.arms(step.name)) == before:  # it failed before its first arm
            record.put(step.name, "start", {ERROR: output})
            return
    if not record.arms(step.name):
        record.put(step.name, "start", {ERROR: "its time was up before the first arm"})


def _process(command: list[str], log: Path, seconds: float) -> tuple[int | None, str]:
    """Exit code, None if the time was up, and the end of the output, which is added to the log."""
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=_AS_USERS | os.environ
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, log.read_bytes()[start:].decode(errors="replace")[-4000:]


def _summary(record: Record) -> int:
    failed = 0
    for name, arms in record.read()["steps"].items():
        errors = {arm: result[ERROR] for arm, result in arms.items() if ERROR in result}
        print(f"{name:12}{len(arms) - len(errors):3} measured{len(errors):3} failed")
        for arm, error in errors.items():
            print(f"  {arm}: {(error.strip().splitlines() or [''])[-1]}")
        failed += len(errors)
    print(f"written: {record.file}")
    return 1 if failed else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all steps; their limits follow")
    parser.add_argument("--again", nargs="+", default=[], choices=STEPS, metavar="STEP", help="measure these anew")
    parser.add_argument("--toy", action="store_true", help="a trial with a tiny model")
    parser.add_argument("--only", choices=STEPS, metavar="STEP", help="this step, in this process, without a limit")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
