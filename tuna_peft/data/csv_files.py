"""Reads CSV and TSV files with a header; every error names its line. Used by `sources`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from tuna_peft.data.json_files import read_text
from tuna_peft.errors import UserError

_DELIMITERS = ",;\t"  # in many languages, spreadsheets write .csv files with semicolons


def read_csv_rows(path: Path) -> list[tuple[int, Any]]:
    """The rows after the header, each with the number of its first line (the header is line 1).

    Values are text; an empty cell is None. The delimiter (comma, semicolon or tab) is detected from the header.

    Raises:
        UserError: The file is empty or not UTF-8, has no usable header, or a row has another number of
            cells.
    """
    text = read_text(path)
    header_line = text.lstrip("\n\r").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"not valid CSV: {error}",
            where=f"{path}: line {line}",
            fix='Put cells with commas, line breaks or quotes in double quotes, and write a quote inside them as "".',
        ) from None
    if not rows:
        raise UserError("the file is empty", where=str(path), fix="Check that what wrote it had finished.")
    (_, names), *records = rows
    names = [name.strip() for name in names]
    if twice := sorted({name or "(empty)" for name in names if not name or names.count(name) > 1}):
        raise UserError(
            f"each column of the header needs a different name; missing or repeated: {', '.join(twice)}",
            where=f"{path}: line 1",
        )
    for number, cells in records:
        if len(cells) != len(names):
            raise UserError(
                f"{len(cells)} cells, but the header has {len(names)}",
                where=f"{path}: line {number}",
                fix="Put cells that contain a comma or a line break in double quotes.",
            )
    return [
        (number, {name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)})
        for number, cells in records
    ]
