"""Plants small bugs, one at a time, and counts how many the tests notice: `make mutate`.

`mutants.yaml` holds one-line mistakes of the kind that a tired developer makes, each with the few test files that
should notice it. A mutant is applied in a temporary copy of the repository, and its tests run until the first failure.
Results are kept: a mutant runs again only when it, its source file or one of its test files has changed.

    python -m benchmarks.mutants [--only training] [--list]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
MUTANTS = Path(__file__).with_name("mutants.yaml")
RESULTS = ROOT / "build" / "mutants.jsonl"

SECONDS = 600
"""Time limit of the tests of one mutant; beyond it they hang, which counts as noticed."""

_IMPORTS = ("pytest", "datasets", "matplotlib", "openai", "bitsandbytes", "peft", "transformers.trainer", "trl")
"""Imported once, before the processes that run tests are forked: these imports take longer than most tests."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        file: The source file, relative to `tuna_peft/`.
        old, new: Text that occurs once in the file, and what replaces it.
        tests: What should notice it, relative to `tests/`: test files, or single tests of slow files.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def key(self) -> str:
        """What the result depends on."""
        from tuna_peft.journal import content_key

        tests = [name.partition("::")[0] for name in self.tests]
        files = [ROOT / "tuna_peft" / self.file, *(ROOT / "tests" / name for name in tests)]
        contents = [file.read_text(encoding="utf-8") for file in files]
        return content_key(file=self.file, old=self.old, new=self.new, tests=list(self.tests), contents=contents)

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old!r} -> {new!r}"


def read_mutants(file: Path = MUTANTS) -> list[Mutant]:
    """All mutants, in the order of the file: `{source file: [{old, new, tests}]}`."""
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [
        Mutant(name, one["old"], one["new"], tuple(one["tests"].split()))
        for name, entries in found.items()
        for one in entries
    ]


@contextlib.contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    """Within this context the mutant is in the copy of the repository."""
    file = copy / "tuna_peft" / mutant.file
    before = file.read_text(encoding="utf-8")
    if before.count(mutant.old) != 1:
        raise ValueError(f"the old text occurs {before.count(mutant.old)} times: {mutant}")
    file.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(before, encoding="utf-8")


def run_tests(copy: Path, tests: Sequence[str], seconds: float = SECONDS) -> tuple[str, str]:
    """Runs test files of the copy in a forked process, until the first failure.

    Returns:
        `passed`, `failed` or `hang`; and the first failure.

    Raises:
        RuntimeError: pytest could not run these files.
    """
    log = copy / "pytest.log"
    if (pid := os.fork()) == 0:
        _run_pytest(copy, tests, log)
    deadline = time.monotonic() + seconds
    while (status := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hang", f"more than {seconds:g} s"
        time.sleep(0.05)
    code, said = os.waitstatus_to_exitcode(status[1]), log.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        return "passed", ""
    failures = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code not in (1, 2) or not failures:
        raise RuntimeError(f"pytest ended with {code} for {' '.join(tests)}:\n{said[-3000:]}")
    return "failed", failures[0]


def failing_test(failure: str) -> str:
    """The test of a line `FAILED tests/a.py::b[an id] - message`; an id may contain spaces."""
    return re.sub(r"^(FAILED|ERROR) (tests/)?", "", failure).partition(" - ")[0].strip()


def _run_pytest(copy: Path, tests: Sequence[str], log: Path) -> None:
    """What the forked process does; it never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr = open(log, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, copy))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tuna_peft", "benchmarks")]:
            del sys.modules[name]
        sys.dont_write_bytecode = True  # a mutant may have the size and the second of the file that it replaces
        import pytest

        options = ["-x", "-q", "-ra", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}"]
        code = pytest.main([*options, *(f"tests/{name}" for name in tests)])
        sys.stdout.flush()
    finally:
        os._exit(int(code))


@contextlib.contextmanager
def copy_of_repository() -> Iterator[Path]:
    """A temporary copy of the tracked files and of those that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="tuna-mutants-") as folder:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        yield Path(folder).resolve()


def _import_once() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("conftest")  # sets variables that the libraries read when they are imported
    for name in _IMPORTS:
        importlib.import_module(name)


def main() -> int:
    """Runs the mutants without a result, and prints all that are not noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutants whose file or old text contains this")
    parser.add_argument("--list", action="store_true", help="show kept results and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    mutants = [one for one in read_mutants() if args.only in one.file or args.only in one.old]
    _import_once()
    from tuna_peft.journal import Journal

    sound: set[str] = set()  # tests that pass without any mutant
    with Journal(args.results) as results, copy_of_repository() as copy:
        for number, mutant in enumerate([] if args.list else mutants, 1):
            if (key := mutant.key()) in results:
                continue
            began = time.monotonic()
            with planted(mutant, copy):
                outcome, detail = run_tests(copy, mutant.tests)
            if outcome == "failed" and (by := failing_test(detail)) not in sound:
                if run_tests(copy, [by])[0] != "passed":
                    print(f"skipped, since {by} fails without it: {mutant}", flush=True)
                    continue
                sound.add(by)
            results.add(key, {"mutant": str(mutant), "noticed": outcome != "passed", "by": detail})
            seconds = time.monotonic() - began
            print(f"{number}/{len(mutants)} {outcome} {seconds:.0f} s: {mutant}  {detail[:120]}", flush=True)
        known = [(mutant, results[mutant.key()]) for mutant in mutants if mutant.key() in results]
    unnoticed = [mutant for mutant, result in known if not result["noticed"]]
    print(f"\n{len(known) - len(unnoticed)} of {len(known)} mutants are noticed ({len(mutants) - len(known)} not run)")
    folders = Counter(mutant.file.partition("/")[0] for mutant, _ in known)
    for folder, count in sorted(folders.items()):
        print(f"  {folder}: {count - sum(one.file.partition('/')[0] == folder for one in unnoticed)} of {count}")
    for mutant in unnoticed:
        print(f"not noticed: {mutant}")
    return 1 if len(unnoticed) > 0.05 * len(known) else 0


if __name__ == "__main__":
    sys.exit(main())
