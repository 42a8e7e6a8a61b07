"""Each row of the docs' first table reads, and `data inspect` ends with a block that reads the same."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from rich.console import Console
from test_shapes import FILES

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.inspect import inspect_file
from tuna_peft.data.load import read_ranked

PLAIN = PromptConfig(template="{instruction}{input}", template_no_input="{instruction}")
DOCS = Path(__file__).parents[2] / "docs" / "data-formats.md"
PAIR = {"prompt": "q", "chosen": "x", "rejected": "y"}
WIDE = {"q": "q", "a": "x", "b": "y", "sa": 2, "sb": 1}
COLUMNS = {"instruction": "q", "completions": ["a", "b"], "scores": ["sa", "sb"]}


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def table(path, *records):
    cells = [map(str, record.values()) for record in records]
    path.write_text("\n".join(map(",".join, [records[0].keys(), *cells])) + "\n")
    return str(path)


def shards(folder, record):
    for index in range(2):
        rows = [{**record, "prompt": f"q{index}{row}"} for row in range(2)]
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / f"train-0000{index}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    return folder


def saved(folder):
    datasets.Dataset.from_list([PAIR]).save_to_disk(folder)
    return str(folder)


def without_header(path):
    path.write_text("q,x,y\n")
    return str(path)


def entry(folder):
    lines(folder / "rows.jsonl", {"instruction": "q", "input": "", "chosen": "x", "rejected": "y"})
    info = folder / "dataset_info.json"
    info.write_text(json.dumps({"mine": {"file_name": "rows.jsonl", "ranking": True}}))
    return str(info)


# The beginning of the row in the docs: what is in a folder, as the `data` of a recipe.
ROWS = {
    "JSON or JSONL of a known format": lambda at: {"path": lines(at / "rows.jsonl", PAIR)},
    "a CSV, TSV or Parquet file, one prompt a row": lambda at: {
        "path": table(at / "rows.csv", WIDE), "columns": COLUMNS
    },
    "a table with one rated response a row": lambda at: {
        "path": table(at / "rows.csv", {"prompt": "q", "a": "x", "s": 2}, {"prompt": "q", "a": "y", "s": 1}),
        "columns": {"instruction": "prompt", "completions": "a", "scores": "s"}, "group_by": "prompt",
    },
    "pairs with a label": lambda at: {
        "path": table(at / "rows.csv", {**WIDE, "w": "model_a"}),
        "columns": {"instruction": "q", "completions": ["a", "b"], "winner": "w"},
    },
    "several scores for each response": lambda at: {
        "path": lines(at / "rows.jsonl", {"q": "q", "a": ["x", "y"], "h": [2, 1], "v": [1, 1]}),
        "columns": {"instruction": "q", "completions": "a", "scores": {"h": 0.7, "v": -0.3}},
    },
    "a CSV file without a header": lambda at: {
        "path": without_header(at / "rows.csv"), "header": False,
        "columns": {"instruction": 1, "completions": [2, 3], "ranks": "best_first"},
    },
    "a folder of shards": lambda at: {"path": str(shards(at / "repo" / "data", PAIR).parent)},
    "compressed files": lambda at: {"path": lines(at / "rows.jsonl.gz", PAIR)},
    "several sources": lambda at: {
        "path": [lines(at / "a.jsonl", PAIR, PAIR), lines(at / "b.jsonl", PAIR)], "weights": [2, 1]
    },
    "a public data set": lambda at: {"path": lines(at / "rows.jsonl", *FILES["ultrafeedback"][0])},
    "LLaMA-Factory's `dataset_info.json`": lambda at: {"path": entry(at), "name": "mine"},
    "a data set saved by `datasets`": lambda at: {"path": saved(at / "saved")},
}  # fmt: skip
ELSEWHERE = (
    "a data set on the Hub",
    "one that is larger than the disk",
    "a spreadsheet",
    "something else",
)  # test_sources, test_spreadsheets, test_suggest


def read(source):
    records, report = read_ranked(source, PLAIN)
    return records, report.kept


def block_of(source):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspect_file(source, PLAIN))
    return DataSource.model_validate(yaml.safe_load(capture.get().partition("In a recipe:")[2])["data"])


def test_every_row_of_the_docs_is_here():
    text = DOCS.read_text(encoding="utf-8").partition("## You have this file")[2].partition("\n\nAll text")[0]
    rows = re.findall(r"^\| (?!you have|---)(.+?) \|", text, flags=re.MULTILINE)
    rows = [re.sub(r"\[(.+?)\]\(.*?\)", r"\1", row) for row in rows]
    assert all(sum(row.startswith(name) for name in (*ROWS, *ELSEWHERE)) == 1 for row in rows)
    assert len(rows) == len(ROWS) + len(ELSEWHERE)


@pytest.mark.parametrize("name", ROWS)
def test_what_the_row_says_reads_and_inspect_ends_with_it(tmp_path, name):
    source = DataSource.model_validate(ROWS[name](tmp_path))
    records, kept = read(source)
    assert kept > 0
    assert read(block_of(source)) == (records, kept)


@pytest.mark.parametrize("name", FILES)
def test_inspect_ends_with_the_block_of_a_public_data_set(jsonl, name):
    source = DataSource(path=jsonl(*FILES[name][0]))
    block = block_of(source)
    assert block.columns is not None and block.format == "columns"
    assert read(block) == read(source)
