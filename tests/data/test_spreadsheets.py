"""Spreadsheets: read like the CSV file of the same table."""

from __future__ import annotations

import sys

import pandas
import pytest

from tuna_peft.data.config import Columns, DataSource, PromptConfig
from tuna_peft.data.load import read_ranked
from tuna_peft.data.sources import read_records
from tuna_peft.errors import UserError

TABLE = [
    ["Frage", "Antwort eins", "Antwort zwei", "Note 1", "Note 2"],
    ["2 + 2?", 4, "vier, glaube ich", 5, 1.5],
    ["Ja?", None, "ja\nja", None, True],
]
COLUMNS = Columns(instruction="Frage", completions=["Antwort eins", "Antwort zwei"], scores=["Note 1", "Note 2"])
LIBRARY = {".xlsx": "openpyxl", ".ods": "odf"}


@pytest.fixture(params=LIBRARY)
def sheet(request, tmp_path):
    """Writes rows as a spreadsheet."""
    pytest.importorskip(LIBRARY[request.param])

    def write(rows):
        path = tmp_path / f"table{request.param}"
        pandas.DataFrame(rows).to_excel(path, header=False, index=False)
        return str(path)

    return write


def test_values_are_text_and_places_are_rows(sheet):
    path = sheet(TABLE)
    rows = list(read_records(DataSource(path=path)))
    assert [where for where, _ in rows] == [f"{path}: row 2", f"{path}: row 3"]
    assert rows[0][1] == dict(zip(TABLE[0], ["2 + 2?", "4", "vier, glaube ich", "5", "1.5"], strict=True))
    assert rows[1][1]["Antwort eins"] is None and rows[1][1]["Note 2"].lower() in ("true", "1")


def test_a_sheet_is_ranked_data(sheet):
    source = DataSource(path=sheet(TABLE[:2]), columns=COLUMNS)
    [row], _ = read_ranked(source, PromptConfig(template="none"))
    assert (row["completions"], row["scores"]) == (["4", "vier, glaube ich"], [5.0, 1.5])


def test_slices_and_sheets_without_a_header(sheet):
    path = sheet([["a", "b", None], [None, None, None], ["c", "d", None]])
    assert [row for _, row in read_records(DataSource(path=path, header=False))] == [
        {"1": "a", "2": "b"}, {"1": "c", "2": "d"}
    ]  # fmt: skip
    [(where, row)] = read_records(DataSource(path=path, header=False, split="train[1:]"))
    assert where.endswith("row 3") and row == {"1": "c", "2": "d"}


def test_a_repeated_column_is_an_error_with_its_row(sheet):
    with pytest.raises(UserError, match="repeated: a") as caught:
        list(read_records(DataSource(path=sheet([["a", "a"], ["x", "y"]]))))
    assert caught.value.where.endswith("row 1")


@pytest.mark.parametrize("suffix", LIBRARY)
def test_damage_and_a_missing_library_are_explained(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(b"PK\x03\x04 no zip file")
    with pytest.raises(UserError, match="not a readable spreadsheet|needs? the package"):
        list(read_records(DataSource(path=str(path))))
    monkeypatch.setitem(sys.modules, LIBRARY[suffix], None)
    monkeypatch.setattr(pandas, "read_excel", lambda *a, **k: __import__(LIBRARY[suffix]))
    with pytest.raises(UserError, match="files need the package") as caught:
        list(read_records(DataSource(path=str(path))))
    assert caught.value.fix.startswith("Install it: pip install o")
