"""Runs every case of a folder: inputs that once failed, each with its command and what should happen.

    python -m benchmarks.cases ../shared/cases --log build/cases.log

A case is a folder with `cmd` (shell lines) and `expected.txt`. What should happen is prose, so this prints the exit
code and the last line that the command printed; the log has all output beside what should happen. Only a Python
traceback or a time-out is counted as a failure by itself; a case that calls the Python API may end with an error that
this package raises.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Reads the command line, runs the cases one after the other, and exits with 1 after a traceback or time-out."""
    parser = argparse.ArgumentParser(description="Runs the cases of a folder and prints a table.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log", type=Path, default=Path("build/cases.log"), help="gets all output")
    parser.add_argument("--seconds", type=float, default=300, help="most time for a case")
    arguments = parser.parse_args()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with open(arguments.log, "w", encoding="utf-8") as log:
        for case in sorted(path.parent for path in arguments.folder.glob("[0-9]*/cmd")):
            code, output = _run(case / "cmd", environment, arguments.seconds)
            expected = (case / "expected.txt").read_text(encoding="utf-8")
            log.write(f"== {case.name}: exit {code}\n{output}\n-- expected\n{expected}\n")
            failed += (bad := code == "time-out" or _crashed(output))
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
            print(f"{'FAILED' if bad else 'exit ' + code:9} {case.name:34} {last.strip()[:110]}", flush=True)
    print(f"{failed} with a traceback or a time-out; all output and what was expected: {arguments.log}")
    sys.exit(failed > 0)


def _crashed(output: str) -> bool:
    """Whether there is a traceback of anything but an error that this package raises on purpose."""
    tracebacks = output.split("Traceback (most recent call last)")[1:]
    return not all(re.search(r"^tuna_peft\.[\w.]+: ", text, re.MULTILINE) for text in tracebacks)


def _run(command: Path, environment: dict[str, str], seconds: float) -> tuple[str, str]:
    try:
        done = subprocess.run(
            ["bash", str(command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return "time-out", str(error.stdout or "")
    return str(done.returncode), done.stdout


if __name__ == "__main__":
    main()
