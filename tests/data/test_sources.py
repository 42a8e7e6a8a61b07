"""Opening sources: places, splits, and every kind of bad file."""

import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tuna_peft.data import sources
from tuna_peft.data.config import DataSource
from tuna_peft.data.sources import read_records
from tuna_peft.errors import UserError

ROWS = [{"n": n} for n in range(10)]


def read(path, **options):
    return list(read_records(DataSource(path=str(path), **options)))


def numbers(records):
    return [record["n"] for _, record in records]


@pytest.fixture
def make(tmp_path):
    def make(kind):
        path = tmp_path / f"rows.{kind}"
        if kind == "json":
            path.write_text(json.dumps(ROWS, indent=1))
        elif kind == "jsonl":
            path.write_text("\n\n".join(map(json.dumps, ROWS)))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        else:
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "place"),
    [("json", ": record 10"), ("jsonl", ": line 19"), ("parquet", ": row 9"), ("dir", "[train]: row 9")],
)
def test_every_kind(make, kind, place):
    path = make(kind)
    records = read(path)
    assert numbers(records) == list(range(10))
    assert records[-1][0] == f"{path}{place}"


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "dir"])
def test_splits_are_those_of_datasets(make, kind):
    path = make(kind)
    whole = datasets.Dataset.from_list(ROWS)
    assert numbers(read(path, split="train[:3]")) == [0, 1, 2]
    assert numbers(read(path, split="train[80%:]")) == [8, 9]
    assert numbers(read(path, split="train[-2:]+train[:1]")) == [8, 9, 0]
    assert numbers(read(path, split="train[2:]", limit=2)) == [2, 3]
    assert numbers(read(path, limit=4)) == whole[:4]["n"]
    assert read(path, split="train[-1:]")[0][0] == read(path)[-1][0]
    with pytest.raises(UserError) as caught:
        read(path, split="test")
    assert "split `test` is not possible" in caught.value.what
    assert "Splits here: train" in caught.value.fix
    with pytest.raises(UserError, match="selects no records"):
        read(path, split="train[:0]")


def test_a_saved_dictionary_has_its_own_splits(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list([{"m": 1}, {"m": 2}])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert read(tmp_path / "d", split="test[1:]") == [(f"{tmp_path / 'd'}[test]: row 1", {"m": 2})]
    assert len(read(tmp_path / "d")) == 10


def test_lines_may_come_under_the_name_json_and_lists_under_jsonl(tmp_path):
    (tmp_path / "a.json").write_text('{"n": 0}\n{"n": 1}\n')
    (tmp_path / "b.jsonl").write_text('[{"n": 0}, {"n": 1}]')
    assert numbers(read(tmp_path / "a.json")) == numbers(read(tmp_path / "b.jsonl")) == [0, 1]
    (tmp_path / "c.jsonl").write_text(
        '\ufeff{"n": 0, "text": "a\u2028b"}\r\n{"n": 1}\r\n', encoding="utf-8", newline=""
    )
    assert numbers(read(tmp_path / "c.jsonl")) == [0, 1]


GOOD = b'{"a": "x"}\n'
BAD_FILES = {
    "empty": ("e.jsonl", b"", "the file is empty", "finished"),
    "blank": ("e.json", b" \n\n", "the file is empty", "finished"),
    "empty list": ("e.json", b"[]", "holds no records", "finished"),
    "not JSON": ("e.jsonl", GOOD + b"hello\n" + GOOD, "not valid JSON", "one JSON object per line"),
    "a CSV in disguise": ("e.json", b"a,b\n1,2\n", "not valid JSON", "one list of objects"),
    "bad comma": ("e.json", b'[{"a": 1},\n {"a": 1,}]', "in or after record 2 (line 2, byte", "json.tool"),
    "no comma": ("e.json", b'[{"a": 1}\n {"a": 2}\n {"a": 3}]', "in or after record 1 (line 2, byte 11)", "json.tool"),
    "two lists": ("e.json", b'[{"a": 1}]\n[{"a": 2}]', "Extra data", "json.tool"),
    "cut line": ("e.jsonl", GOOD * 2 + b'{"a": "long te', "ends in the middle of a record, after 14", "incomplete"),
    "cut behind a brace": ("e.jsonl", GOOD + b'{"a": {"b": 1}', "ends in the middle of a record", "incomplete"),
    "cut list": ("e.json", b'[{"a": 1},\n{"a": "long te', "middle of the list, in or after record 2", "incomplete"),
    "cut list behind a record": ("e.json", b'[{"a": [1]}, {"a": [2]', "in or after record 2 (line 1,", "incomplete"),
    "cut list behind a comma": ("e.json", b'[{"a": 1},', "in or after record 1 (line 1, byte 10)", "incomplete"),
    "cut character": ("e.jsonl", GOOD + '{"a": "é'.encode()[:-1], "middle of a character, at byte 18", "incomplete"),
    "latin 1": ("e.jsonl", GOOD + '{"a": "é"}'.encode("latin1"), "byte 0xe9 at byte 18, line 2", "CP1252"),
    "utf 16": ("e.json", '[{"a": 1}]'.encode("utf-16"), "not UTF-8 text: byte 0xff at byte 0", "UTF-16"),
    "one object": ("e.json", b'{"data": [], "version": 1}', "one object with the keys `data`, `version`", "list"),
    "a text": ("e.json", b'"hello"', "a single value", "list of objects"),
    "list of texts": ("e.json", b'["a", "b"]', "expected an object with keys, found text", "JSON object"),
    "deep nesting": ("e.json", b"[" * 100_000, "nested too deeply", None),
    "not Parquet": ("e.parquet", b"PAR1 nonsense", "not a readable Parquet file", "incomplete"),
    "unknown ending": ("e.docx", b"a,b\n", "unknown kind of file: .docx", ".json, .jsonl, .ndjson, .csv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, content, what, fix = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where.startswith(str(path))
    assert what in caught.value.what
    assert (fix or "") in (caught.value.fix or "")


# A file that is something else than its name says: name, content, what it is, what to do.
DISGUISED = [
    ("e.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "LFS", "git lfs pull"),
    ("e.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "Git LFS", "git lfs"),
    ("e.csv", b"<!doctype html><html>", "a web page", "`resolve`"),
    ("e.jsonl", gzip.compress(GOOD, mtime=0), "compressed by gzip", "Add .gz"),
    ("e.json", b"PK\x03\x04...", "an archive", ".xlsx"),
    ("e.csv", b"PAR1...PAR1", "a Parquet file", ".parquet"),
]


# Their contents are no test ids: two processes must collect the same ones.
@pytest.mark.parametrize(("name", "content", "what", "fix"), DISGUISED, ids=range(len(DISGUISED)))
def test_files_in_disguise(tmp_path, name, content, what, fix):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        read(tmp_path / name)
    assert caught.value.where == str(tmp_path / name) and fix in caught.value.fix


def test_extensions_in_capitals(tmp_path):
    (tmp_path / "a.JSONL").write_bytes(GOOD)
    (tmp_path / "b.JSONL.GZ").write_bytes(gzip.compress(GOOD))
    (tmp_path / "c.CSV").write_bytes(b"a\nx\n")
    assert [read(tmp_path / name)[0][1] for name in ("a.JSONL", "b.JSONL.GZ", "c.CSV")] == [{"a": "x"}] * 3


def test_links_pipes_and_addresses_are_named(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to("elsewhere.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, what in (("gone", "a link to elsewhere.jsonl"), ("loop", "links back"), ("pipe", "no regular file")):
        with pytest.raises(UserError, match=what):
            read(tmp_path / f"{name}.jsonl")
    for address, fix in (
        ("https://huggingface.co/datasets/owner/name/resolve/main/a.jsonl", "Write `owner/name`"),
        ("hf://datasets/owner/name", "Write `owner/name`"),
        ("s3://bucket/a.jsonl", "Download it"),
    ):
        with pytest.raises(UserError, match="this is an address") as caught:
            read(address)
        assert fix in caught.value.fix


def test_bad_lines_name_their_line(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(GOOD + b"\n" + b"[1]\n")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "e.jsonl")
    assert caught.value.where == f"{tmp_path / 'e.jsonl'}: line 3"


def test_a_cut_parquet_file(make):
    path = make("parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(path)


def test_missing_files_name_what_is_there(make, tmp_path):
    make("jsonl")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "row.jsonl")
    assert (caught.value.what, caught.value.fix) == ("there is no such file", "Did you mean rows.jsonl?")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "zzz.parquet")
    assert caught.value.fix == f"In {tmp_path} there are: rows.jsonl."
    with pytest.raises(UserError, match="directory .* does not exist"):
        read(tmp_path / "nowhere" / "rows.jsonl")


def test_a_path_in_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        read("data/rows")


def test_a_directory_that_was_not_saved(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert "not a directory from `datasets.save_to_disk`" in caught.value.what
    assert "save_to_disk" in caught.value.fix


def test_hub_fields_have_no_effect_on_files(make):
    with pytest.raises(UserError, match="`revision` is for Hub data sets"):
        read(make("json"), revision="main")


def test_builtin_data(tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "pico_llama" / "data"
    folder.mkdir(parents=True)
    (folder / "sft.jsonl").write_text('{"n": 1}\n')
    monkeypatch.setattr(sources.importlib.resources, "files", lambda package: tmp_path)
    assert numbers(read("builtin:pico-llama/sft.jsonl")) == [1]
    with pytest.raises(UserError) as caught:
        read("builtin:pico-llama/stf.jsonl")
    assert caught.value.fix == "Did you mean sft.jsonl?"
    with pytest.raises(UserError, match="there is no such file"):
        read("builtin:pico-llama/sft")
    for wrong in ("builtin:pico", "builtin:pico-llama/../x", "builtin:other/sft.jsonl"):
        with pytest.raises(UserError, match="no such data in the package"):
            read(wrong)


def test_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = read("owner/set", name="conf", split="test[:5]", revision="v1", limit=2)
    assert records == [("owner/set[test[:5]]: row 0", {"n": 0}), ("owner/set[test[:5]]: row 1", {"n": 1})]
    assert asked == [(("owner/set", "conf"), {"split": "test[:5]", "revision": "v1"})]


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (ConnectionError("Couldn't reach 'o/s' on the Hub"), "cannot be reached", "HF_HUB_OFFLINE=1"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/s' is a gated dataset"), "gated", "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/s' doesn't exist"), "no such data set", "hf auth login"),
        (ValueError('Unknown split "x"'), "Unknown split", "`split`"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported", "`name`"),
    ],
)
def test_hub_errors(monkeypatch, error, what, fix):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        read("o/s")
    assert caught.value.where == "o/s[train]"
    assert what in caught.value.what
    assert fix in caught.value.fix
