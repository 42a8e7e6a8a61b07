"""Downloads published benchmarks at fixed versions, for `tuna-peft benchmarks fetch`."""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.evaluation.lmentry.rules import RULES
from tuna_peft.evaluation.lmentry.scores import VARIANTS
from tuna_peft.files import sha256, write_bytes, write_json
from tuna_peft.progress import tracked

ADDRESS = "https://raw.githubusercontent.com"
RECORD = "fetched.json"
_TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class Published:
    """Where a benchmark's files are published.

    Attributes:
        repository: `owner/name` on GitHub.
        version: Commit or tag.
        license: What to know before using it.
        files: Path in the folder -> path in the repository.
        index: One of the files, with a name of a task in each line; `tasks/NAME.json` belongs to the benchmark too.
        digest: SHA-256 of the lines `HASH  PATH` of all files, sorted by path; None where it is not known.
    """

    repository: str
    version: str
    license: str
    files: dict[str, str]
    index: str | None = None
    digest: str | None = None


PUBLISHED = {
    "natural-instructions": Published(
        "allenai/natural-instructions",
        "v2.8",
        "Apache-2.0; tasks have the licenses of their own sources, see `URL` and `Source` in them",
        {"splits/default/test_tasks.txt": "splits/default/test_tasks.txt"},
        index="splits/default/test_tasks.txt",
    ),
    "lmentry": Published(
        "aviaefrat/lmentry",
        "646ae9080dad00a194fa32cb0f330d7acf3ce60c",
        "the repository has no license file; it asks not to train on it",
        {f"{task}.json": f"data/{task}.json" for task in (*RULES, *VARIANTS)},
        digest="c339a56cc79115c3106272092506d94c1a0a067cae66805c48c6d905e4d860ef",
    ),
    "vicuna": Published(
        "lm-sys/FastChat",
        "69d085eadab8e9fcf831a97e17e132658c3d2272",
        "Apache-2.0",
        {"question.jsonl": "fastchat/eval/table/question.jsonl"},
        digest="da23f563a47b1223c1752b474b58e1613ce9b0fc6ead79c0181e8f840bbdbfb6",
    ),
}


def fetch_benchmark(name: str, folder: Path, address: str = ADDRESS) -> tuple[int, str]:
    """Downloads the files of a benchmark that are not in `folder` yet, and records their hashes there.

    Args:
        name: A key of `PUBLISHED`.
        folder: Where to write; created if missing.
        address: Serves `/REPOSITORY/VERSION/PATH`.

    Returns:
        The number of files that were downloaded, and the digest of all, as in `Published.digest`.

    Raises:
        UserError: No such benchmark, a file cannot be downloaded, or the files are not the published ones.
    """
    if name not in PUBLISHED:
        raise UserError(f"there is no benchmark {name!r}", fix=did_you_mean(name, PUBLISHED))
    benchmark = PUBLISHED[name]
    base, files, new = f"{address}/{benchmark.repository}/{benchmark.version}", dict(benchmark.files), 0
    if benchmark.index is not None:
        new += _fetch(base, files[benchmark.index], folder / benchmark.index)
        tasks = (folder / benchmark.index).read_text(encoding="utf-8", errors="replace").split()
        if not tasks or not all(re.fullmatch(r"task[\w-]+", task, re.ASCII) for task in tasks):
            where, fix = str(folder / benchmark.index), "Delete it, and fetch the benchmark again."
            raise UserError("this is no list of tasks", where=where, fix=fix)
        files |= {f"tasks/{task}.json": f"tasks/{task}.json" for task in tasks}
    for path, source in tracked(sorted(files.items()), f"downloading {name}", "files", len(files)):
        new += _fetch(base, source, folder / path)
    hashes = {path: sha256(folder / path) for path in sorted(files)}
    digest = hashlib.sha256("".join(f"{one}  {path}\n" for path, one in hashes.items()).encode()).hexdigest()
    if benchmark.digest not in (None, digest):
        raise UserError(
            "these are not the files that were published", where=str(folder), fix="Delete them, and fetch them again."
        )
    facts = {"repository": benchmark.repository, "version": benchmark.version, "license": benchmark.license}
    write_json(folder / RECORD, {**facts, "digest": digest, "sha256": hashes})
    return new, digest


def _fetch(base: str, source: str, file: Path) -> bool:
    """Whether the file had to be downloaded; it is written whole or not at all."""
    if file.exists():
        return False
    url = f"{base}/{source}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            content = response.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise UserError(
            f"cannot be downloaded: {error}",
            where=url,
            fix="Run the same command again, where there is a network: finished files are kept. `--address` names "
            "another server.",
        ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)
    return True
