"""Records are read as they are asked for, and tokenized rows are on the disk: memory is bounded."""

import json
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PretrainedConfig

from tuna_peft.data import csv_files, json_files
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import encode_source
from tuna_peft.data.rows_on_disk import write_rows
from tuna_peft.data.sources import read_records
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="none")


def record(number):
    said = {"prompt": "ab" * (number % 5 + 1), "completions": ["cd", "xyxy"], "scores": [number % 3, 7]}
    return {**said, "note": "x" * 1000}


def write(path, count):
    records = map(record, range(count))
    if path.suffix == ".json":
        path.write_text(json.dumps(list(records)))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
    elif path.suffix == ".csv":
        path.write_text("q,a,b\n" + "".join(f"{one['prompt']},cd,xyxy\n" for one in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=100)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_what_is_wrong_further_down_is_raised_there(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(json_files, "_WINDOW", 256)
    monkeypatch.setattr(csv_files, "_ROWS", 5)
    path = write(tmp_path / f"rows{suffix}", 50)
    path.write_text(path.read_text() + "}")
    records = read_records(DataSource(path=str(path)))
    assert len([next(records) for _ in range(49)]) == 49
    with pytest.raises(UserError):
        list(records)


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_a_list_is_the_same_however_it_is_cut(tmp_path, monkeypatch, window):
    rows = [{"n": 12, "t": "a]\u2028}, {"}, {}, {"l": [[1, -2.5e3], [True, None]]}, {"t": '\\"é\\u0041\n'}, {"n": 7}]
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(rows, indent=window % 3, ensure_ascii=False, separators=(" ,", ": ")) + "\n ")
    monkeypatch.setattr(json_files, "_WINDOW", window)
    assert [one for _, one in read_records(DataSource(path=str(path)))] == rows
    for wrong in ("[1,,2]", '[{"n": 1} {"n": 2}]', '[{"n": 1},]', '[{"n": 1}]]', '[{"n": 1', "[", '[{"n": 1}] x'):
        path.write_text(wrong)
        with pytest.raises(UserError, match="JSON|ends in the middle|expected an object"):
            list(read_records(DataSource(path=str(path))))


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (99, 101), (150, 250), (249, 250)])
def test_slices_of_row_groups(tmp_path, start, stop):
    path = write(tmp_path / "rows.parquet", 250)
    split = f"train[{start}:{'' if stop is None else stop}]"
    records = list(read_records(DataSource(path=str(path), split=split)))
    assert [where for where, _ in records] == [f"{path}: row {index}" for index in range(start, stop or 250)]
    assert [one for _, one in records] == [record(index) for index in range(start, stop or 250)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer, suffix, monkeypatch):
    monkeypatch.setattr(json_files, "_WINDOW", 1 << 12)

    def peak(count):
        source = DataSource(path=str(write(tmp_path / f"{count}{suffix}", count)))
        tracemalloc.start()
        before = pyarrow.total_allocated_bytes()
        encoded, counts = encode_source(
            source, PLAIN, tokenizer, PretrainedConfig(), max_length=None, overflow="error"
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(encoded) == counts["kept"] == count
        # The data set itself is mapped from the disk; a Parquet file is read a group of rows at a time.
        assert pyarrow.total_allocated_bytes() - before < 1 << 16
        return found

    peak(300)  # imports and caches
    assert peak(4000) < 1.5 * peak(1000)  # both are several chunks; a list of rows would make it 4


def test_rows_are_those_that_were_written_and_go_with_the_process():
    code = (
        "from datasets import Value\n"
        "from tuna_peft.data.rows_on_disk import write_rows\n"
        "rows = write_rows([[{'n': 1}, {'n': None}], [], [{'n': 3, 't': 'x'}]], "
        "{name: Value('string' if name == 't' else 'int32') for name in 'nta'})\n"
        "print(rows.cache_files[0]['filename'], rows[:])"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    file, _, rows = done.stdout.partition(" ")
    assert rows.strip() == "{'n': [1, None, 3], 't': [None, None, 'x']}"  # the column that no row has is left out
    assert Path(file).is_relative_to(tempfile.gettempdir()) and not Path(file).exists()


def test_a_failure_in_the_middle_is_raised():
    def chunks():
        yield [{"n": 1}]
        raise UserError("no")

    from datasets import Value

    with pytest.raises(UserError, match="no"):
        write_rows(chunks(), {"n": Value("int32")})
