"""Folders, patterns and lists of files, compressed files, mixing, and the types of Parquet columns."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import read_ranked
from tuna_peft.data.sources import is_here, read_records
from tuna_peft.errors import UserError


def read(path, **options):
    return list(read_records(DataSource(path=path if isinstance(path, list) else str(path), **options)))


def numbers(records):
    return [record["n"] for _, record in records]


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"n": value} for value in values]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with pyarrow.output_stream(str(path), compression="detect") as stream:
            stream.write(text.encode())
    return str(path)


@pytest.fixture(params=[".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def folder(request, tmp_path):
    """Two shards of `train`, one of `test`, as a clone of a data set of the Hub has them."""
    data = tmp_path / "repo" / "data"
    write(data / f"train-00000-of-00002{request.param}", [0, 1, 2])
    write(data / f"train-00001-of-00002{request.param}", [3, 4])
    write(data / f"test-00000-of-00001{request.param}", [5])
    (tmp_path / "repo" / "README.md").write_text("A data set.")
    (tmp_path / "repo" / "dataset_infos.json").write_text("{}")
    return tmp_path / "repo"


def test_the_shards_of_a_split_are_read_as_one(folder):
    assert numbers(read(folder)) == [0, 1, 2, 3, 4]
    assert numbers(read(folder / "data")) == [0, 1, 2, 3, 4]
    assert numbers(read(folder, split="test")) == [5]
    assert numbers(read(folder, split="train[2:4]")) == [2, 3]
    assert numbers(read(folder, split="test+train[-1:]")) == [5, 4]
    assert numbers(read(folder, limit=4)) == [0, 1, 2, 3]
    with pytest.raises(UserError) as caught:
        read(folder, split="dev")
    assert "Splits here: test, train" in caught.value.fix


def test_places_name_the_shard_and_differ(folder):
    places = [where for where, _ in read(folder)]
    assert places[3].startswith(f"{folder}: train-00001-of-00002")
    assert len(set(places)) == 5


def test_a_pattern_reads_all_its_files_in_order_of_their_names(folder):
    assert numbers(read(f"{folder}/data/*")) == [5, 0, 1, 2, 3, 4]
    assert numbers(read(f"{folder}/**/train-*1-of*")) == [3, 4]
    assert is_here(f"{folder}/data/*")
    with pytest.raises(UserError, match="no file matches the pattern"):
        read(f"{folder}/data/*.txt")


def test_names_of_files_and_folders_tell_the_split(tmp_path):
    for index, name in enumerate(["train.jsonl", "dev.jsonl", "test/part.jsonl", "trainer.jsonl", ".hidden/x.jsonl"]):
        write(tmp_path / name, [index])
    assert numbers(read(tmp_path)) == [0, 3]
    assert numbers(read(tmp_path, split="validation")) == [1]
    assert numbers(read(tmp_path, split="test")) == [2]


def test_files_of_several_kinds_need_a_pattern(tmp_path):
    write(tmp_path / "a.jsonl", [0])
    write(tmp_path / "b.parquet", [1])
    with pytest.raises(UserError, match="files of several kinds: a.jsonl, b.parquet"):
        read(tmp_path)
    assert numbers(read(f"{tmp_path}/*.parquet")) == [1]


def test_a_cut_compressed_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path, range(1000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read the file"):
        read(path)


def test_a_list_of_paths(tmp_path):
    first, second = write(tmp_path / "a.jsonl", range(3)), write(tmp_path / "b.parquet", range(10, 12))
    records = read([first, second])
    assert numbers(records) == [0, 1, 2, 10, 11]
    assert [where for where, _ in records][2:4] == [f"{first}: a.jsonl line 3", f"{second}: b.parquet row 0"]
    assert numbers(read([first, second], limit=4)) == [0, 1, 2, 10]
    assert len({where.rpartition(": ")[2] for where, _ in read([first, first])}) == 6
    with pytest.raises(UserError, match="there is no such file"):
        read([first, str(tmp_path / "c.jsonl")])


def test_weights_mix_until_one_path_has_no_more(tmp_path):
    paths = [write(tmp_path / "a.jsonl", range(6)), write(tmp_path / "b.jsonl", range(10, 20))]
    mixed = numbers(read(paths, weights=[2, 1]))
    assert mixed == [0, 1, 10, 2, 3, 11, 4, 5, 12]  # every beginning has the proportions, the larger part first
    assert numbers(read(paths, weights=[1, 3], limit=8)) == [10, 11, 0, 12, 13, 14, 1, 15]
    assert len(read(paths, weights=[1, 1], limit=4)) == 4
    with pytest.raises(ValueError, match="as many paths"):
        DataSource(path=paths, weights=[1])


def test_types_of_parquet_columns(tmp_path):
    """Bytes, large strings, decimals, dictionaries (categories of pandas) and nested lists are text and numbers."""
    path = tmp_path / "types.parquet"
    table = pyarrow.table(
        {
            "question": pyarrow.array([b"Name a colour.", "Gr\u00fc\u00df dich.".encode()], pyarrow.binary()),
            "answers": pyarrow.array([["Blue.", "Colour"], ["Hi.", "No"]], pyarrow.list_(pyarrow.large_string())),
            "score": pyarrow.array([[decimal.Decimal("4.50"), decimal.Decimal("1.25")]] * 2),
            "kind": pyarrow.array(["a", "b"]).dictionary_encode(),
            "day": pyarrow.array([datetime.date(2026, 1, 1)] * 2),
        }
    )
    pyarrow.parquet.write_table(table, path)
    columns = {"instruction": "question", "completions": "answers", "scores": "score", "id": "kind"}
    records, _ = read_ranked(DataSource(path=str(path), columns=columns), PromptConfig(template="none"))
    assert records[1]["prompt"] == "Gr\u00fc\u00df dich."
    assert [record["id"] for record in records] == ["a", "b"]
    assert records[0]["scores"] == [4.5, 1.25]


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "image.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "image": [b"\xff\xd8\xff"]}), path)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == f"{path}: row 0, `image`"
    assert "3 bytes that are not UTF-8 text" in caught.value.what


def test_streamed_rows_are_downloaded_once(tmp_path, monkeypatch):
    """A stream of local shards stands for the Hub; afterwards the rows are there without it, in the same order."""
    import datasets

    for index in range(3):
        write(tmp_path / "shards" / f"{index}.parquet", range(index * 10, index * 10 + 10))
    asked = []
    real = datasets.load_dataset

    def load_dataset(path, name, **options):
        asked.append(path)
        options.pop("revision")
        return real("parquet", data_files=str(tmp_path / "shards" / "*.parquet"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first = read("owner/huge", streaming=True, limit=12)
    assert numbers(first) == list(range(12))
    assert read("owner/huge", streaming=True, limit=12) == first
    assert asked == ["owner/huge"]
    assert numbers(read("owner/huge", streaming=True, limit=2)) == [0, 1]
    assert len(asked) == 2  # another limit is another selection


@pytest.mark.parametrize("options", [{}, {"limit": 5, "split": "train[5:]"}])
def test_streaming_needs_a_limit_and_no_slice(options):
    with pytest.raises(ValueError, match="`streaming` reads the first rows"):
        DataSource(path="owner/huge", streaming=True, **options)


def test_streaming_has_no_effect_on_files(tmp_path):
    with pytest.raises(UserError, match="`streaming` is for Hub data sets"):
        read(write(tmp_path / "a.jsonl", [1]), streaming=True, limit=1)
