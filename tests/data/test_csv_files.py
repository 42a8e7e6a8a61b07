"""CSV files: places, delimiters, empty cells, numbers in text, and every kind of bad file."""

import csv

import pandas
import pytest

from tuna_peft.data.config import Columns, DataSource, PromptConfig
from tuna_peft.data.load import load_ranked
from tuna_peft.data.sources import read_records
from tuna_peft.errors import UserError

TABLE = """\
question,first,second,third,first_score,second_score,third_score
"Sort, please:
b a",a b,b a,,9,1.5,
2 + 2?,4,5,"four, I ""think\""",true,FALSE,true
"""
COLUMNS = Columns(
    instruction="question",
    completions=["first", "second", "third"],
    scores=["first_score", "second_score", "third_score"],
)


def rows(tmp_path, content, name="rows.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_records(DataSource(path=str(path))))


def test_rows_know_the_line_where_they_begin(tmp_path):
    records = rows(tmp_path, TABLE)
    assert [where.rsplit(": ")[-1] for where, _ in records] == ["line 2", "line 4"]
    assert records[0][1]["question"] == "Sort, please:\nb a"
    assert records[0][1]["third"] is None
    assert records[1][1]["third"] == 'four, I "think"'


def test_a_table_with_lists_of_different_lengths_becomes_ranked(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(TABLE)
    dataset, report = load_ranked(DataSource(path=str(path), columns=COLUMNS), PromptConfig(template="{instruction}"))
    assert report.kept == 2
    assert dataset[0]["completions"] == ["a b", "b a"]
    assert dataset[0]["scores"] == [9.0, 1.5]
    assert dataset[1]["completions"] == ["4", 'four, I "think"', "5"]  # "4" stays a text
    assert dataset[1]["ranks"] == [0, 0, 1]


@pytest.mark.parametrize(
    ("scores", "message"),
    [("9,,", "candidate 1: the score is missing"), ("9,good,", "candidate 1: the score is the text 'good'"),
     ('9,"1,5",', "a point, not a comma"), ("9,nan,", "not a finite number"),
     ("9,1,3", "candidate 2: the response is missing")],
)  # fmt: skip
def test_only_a_column_that_is_empty_in_all_respects_is_left_out(tmp_path, scores, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"{TABLE.splitlines()[0]}\nSort,a b,b a,,{scores}\n")
    with pytest.raises(UserError, match=message):
        load_ranked(DataSource(path=str(path), columns=COLUMNS), PromptConfig())


@pytest.mark.parametrize(
    "content",
    ["a;b\n1,5;2\n", "a\tb\n1,5\t2\n", b"\xef\xbb\xbfa;b\r\n1,5;2\r\n", "\na;b\n\n;\n1,5;2\n"],
    ids=["semicolons", "tabs", "as spreadsheets write it", "blank lines"],
)
def test_delimiters_and_line_ends(tmp_path, content):
    assert [row for _, row in rows(tmp_path, content)] == [{"a": "1,5", "b": "2"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("a,b\n", "the file holds no records"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, but the header has 2"),
        ("a,b\n1\n", "line 2: 1 cells"),
        ("a,a\n1,2\n", "line 1: each column of the header needs a different name; missing or repeated: a"),
        ("a,\n1,2\n", r"missing or repeated: \(empty\)"),
        (",a\n1,2\n", r"missing or repeated: \(empty\)"),
        ('a,b\n1,2\n3,"x" y\n', "line 3: not valid CSV"),
        ('a,b\n1,"x\n', "line 2: not valid CSV: unexpected end of data"),
        ("a,b\n1,\xe4\n".encode("latin-1"), "not UTF-8 text: byte 0xe4 at byte 6, line 2"),
    ],
)
def test_bad_files_say_where(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        rows(tmp_path, content)


def test_the_index_that_pandas_writes_is_a_column(tmp_path):
    frame = pandas.DataFrame([{"a": "x", "b": "y"}, {"a": "z", "b": "w"}])
    frame.to_csv(tmp_path / "index.csv")
    found = read_records(DataSource(path=str(tmp_path / "index.csv")))
    assert [row["a"] for _, row in found] == ["x", "z"]


@pytest.mark.parametrize("content", ['"a, b, c";d\n1;2\n', "sep=;\na, b, c;d\n1;2\n"])
def test_a_name_may_hold_delimiters(tmp_path, content):
    assert [row for _, row in rows(tmp_path, content)] == [{"a, b, c": "1", "d": "2"}]


def test_the_extension_tells_the_delimiter_of_tsv(tmp_path):
    found = rows(tmp_path, "a, b, c\td\n1\t2\n", name="t.tsv")
    assert [row for _, row in found] == [{"a, b, c": "1", "d": "2"}]


def test_a_cell_of_any_length(tmp_path):
    text = "a " * 100_000
    assert rows(tmp_path, f"a,b\n{text}x,2\n")[0][1] == {"a": f"{text}x", "b": "2"}
    assert csv.field_size_limit() < len(text)  # other code keeps its limit


@pytest.mark.parametrize("first", ["Name a colour.,Blue.,5", f"question,{'long ' * 40},score", 'a,"b\nc",d'])
def test_a_first_line_that_is_no_header_is_said(tmp_path, first):
    with pytest.raises(UserError, match="the first line is no header"):
        rows(tmp_path, f"{first}\nName a day.,Monday,3\n")


def test_columns_by_number(tmp_path):
    path = tmp_path / "rows.csv"
    columns = {"instruction": 1, "completions": [2, 3], "scores": [4, 5]}
    plain = PromptConfig(template="{instruction}")
    path.write_text("Name a colour.,Blue.,Colour,5,1\nName a day.,Day,Monday,2,4\n")
    dataset, _ = load_ranked(DataSource(path=str(path), columns=columns, header=False), plain)
    assert dataset["completions"][:] == [["Blue.", "Colour"], ["Monday", "Day"]]
    path.write_text("q,a,b,sa,sb\nName a colour.,Blue.,Colour,5,1\n")
    dataset, _ = load_ranked(DataSource(path=str(path), columns=columns), plain)
    assert dataset["prompt"][:] == ["Name a colour."]
    with pytest.raises(UserError, match="there is no column 9, there are 5"):
        load_ranked(DataSource(path=str(path), columns={**columns, "id": 9}), plain)
