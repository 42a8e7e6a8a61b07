"""Data files that a stranger wrote: one clear error with file and place, in seconds."""

from __future__ import annotations

import difflib
import errno
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_candidates, load_prompts, load_ranked
from tuna_peft.errors import UserError
from tuna_peft.files import disk_full_is_a_user_error

GOOD = '{"prompt": "p", "completions": ["a", "b"], "scores": [2, 1]}'


def read(file, content, load=load_ranked):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(DataSource(path=str(file)), PromptConfig())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "p", "completions": ["a", "b"], "scores": [2, 1], "scores": [1, 2]}', "`scores` is given twice"),
        (GOOD.replace("[2,", "[" + "9" * 5000 + ","), "5,000 digits"),
        (GOOD.replace("[2,", "[" + "9" * 400 + ","), "400 digits"),
        (GOOD.replace('"p"', "[" * 100_000 + "]" * 100_000), "nested too deeply"),
        (GOOD.replace("{", '{"id": "\\ud800", ', 1), "half of a surrogate pair"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, why):
    with pytest.raises(UserError, match=why) as caught:
        read(tmp_path / "x.jsonl", f"{GOOD}\n{line}\n{GOOD}\n")
    assert "x.jsonl: line 2" in caught.value.where
    with pytest.raises(UserError, match=why) as caught:
        read(tmp_path / "x.json", f"[{GOOD},\n{line},\n{GOOD}]")
    assert "x.json: record 2" in caught.value.where


@pytest.mark.parametrize("load", [load_ranked, load_candidates])
def test_a_row_of_50_000_responses_is_refused(tmp_path, load):
    many = {"prompt": "p", "completions": [f"r{n}" for n in range(50_000)], "scores": list(range(50_000))}
    with pytest.raises(UserError, match="50,000 responses to one prompt, at most 1,000"):
        read(tmp_path / "x.jsonl", json.dumps(many), load)


def test_a_csv_of_20_000_columns_is_refused_in_a_short_message(tmp_path, monkeypatch):
    compared, similar = [], difflib.get_close_matches

    def spy(name, options, **settings):
        compared.append(len(options))
        return similar(name, options, **settings)

    monkeypatch.setattr(difflib, "get_close_matches", spy)
    names = [f"column{n}" for n in range(20_000)]
    with pytest.raises(UserError, match="no known format has the keys `column0`, .*, ...") as caught:
        read(tmp_path / "x.csv", ",".join(names) + "\n" + ",".join("x" for _ in names) + "\n")
    assert len(str(caught.value)) < 3000 and 0 < max(compared) <= 1000  # 20,000 take seconds, for each known format
    with pytest.raises(UserError, match="missing or repeated: column0, ") as caught:
        read(tmp_path / "y.csv", ",".join(names + names) + "\n" + ",".join("x" for _ in names + names) + "\n")
    assert len(str(caught.value)) < 1000


def test_parquet_that_python_cannot_hold_is_a_user_error(tmp_path):
    file = tmp_path / "x.parquet"
    # A date in the year 300,000: Arrow reads it, Python has no such date.
    when = pyarrow.array([1 << 53], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "when": when}), file)
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_prompts(DataSource(path=str(file)), PromptConfig())
    whole = file.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-9] + b"\xff" * 5 + whole[-4:]):
        with pytest.raises(UserError, match="file"):
            read(file, content, load_prompts)


def test_a_limit_of_file_sizes_is_no_full_disk(tmp_path):
    with (
        pytest.raises(UserError, match="larger than is allowed here.*\n.*ulimit -f"),
        disk_full_is_a_user_error(tmp_path / "x"),
    ):
        raise OSError(errno.EFBIG, "File too large")


def test_ulimit_ends_a_command_with_one_sentence(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join([GOOD] * 2000))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "from tuna_peft.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "data", "convert", "x.jsonl", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "out.jsonl: the file would be larger than is allowed here" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]
