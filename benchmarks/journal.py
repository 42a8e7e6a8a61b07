"""Times the journal: `python -m benchmarks.journal [ENTRIES ...] [--bytes N] [--before FOLDER]`.

Prints, for each number of entries, what it takes to append them, to open the file, and to open it and read every
entry, as a resumed run does: seconds of processor time and the peak of resident memory, each in a process of its own.
With `--before` also those of another version of the package.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = ("append", "open", "resume")


def measure(step: str, file: str, entries: str, size: str) -> tuple[float, float]:
    """One step, without the computation of keys: seconds of processor time, and peak of resident memory in GiB."""
    from tuna_peft.journal import Journal, content_key

    keys, spent = map(lambda number: content_key(number=number), range(int(entries))), 0.0
    value = {"texts": ["x" * (int(size) - 30)], "lengths": [1]}
    began = time.process_time()
    with Journal(file) as journal:
        spent += time.process_time() - began
        for key in keys if step != "open" else ():
            began = time.process_time()
            if step == "append":
                journal.add(key, value)
            elif key not in journal or not journal[key]:
                raise SystemExit(f"{key} is missing")
            spent += time.process_time() - began
    return spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_process(package: str, *arguments: str) -> tuple[float, float]:
    """`measure` in a process of its own, with the package in the folder `package`."""
    call = "import journal, sys; print(*journal.measure(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], cwd=package, stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{Path(__file__).parent}"},
    )  # fmt: skip
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak


def main() -> None:
    """Reads the command line, and prints a line for each step and version."""
    parser = argparse.ArgumentParser(description="Times appending to a journal, opening it and reading it.")
    parser.add_argument("entries", type=int, nargs="*", default=[100_000, 5_000_000])
    parser.add_argument("--bytes", type=int, default=1000, help="size of a value, at least 31")
    parser.add_argument("--before", type=os.path.abspath, help="another version of the package, to compare with")
    arguments = parser.parse_args()
    packages = {"now": str(Path(__file__).parents[1])} | ({"before": arguments.before} if arguments.before else {})
    for entries in arguments.entries:
        with tempfile.TemporaryDirectory() as folder:
            for step in STEPS:
                for name, package in packages.items():
                    file = Path(folder) / f"{name}.jsonl"
                    seconds, peak = in_process(package, step, str(file), str(entries), str(arguments.bytes))
                    written = file.stat().st_size / 2**30
                    line = f"{entries:,} entries ({written:.2f} GiB), {step}, {name}: {seconds:.1f} s, {peak:.2f} GiB"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
