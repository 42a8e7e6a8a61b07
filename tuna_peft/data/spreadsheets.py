"""Reads the first sheet of an Excel or LibreOffice file as a table, like a CSV file. Used by `shards`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuna_peft.data.csv_files import named_rows
from tuna_peft.errors import UserError, first_line


def sheet_rows(path: Path, *, header: bool = True) -> Iterator[tuple[int, Any]]:
    """The rows after the header, each with its number in the sheet; the whole sheet is in memory.

    Values are text, as in `csv_rows`; an empty cell is None, and empty rows and columns are left out.

    Raises:
        UserError: The library is missing, the file is damaged, or see `csv_rows`.
    """
    import pandas

    try:
        # As text: an answer such as 4 is no number here, and empty cells are not NaN.
        frame = pandas.read_excel(path, header=None, dtype=str, na_filter=False)
    except ImportError as error:
        package = "odfpy" if path.suffix == ".ods" else "openpyxl"
        what = f"{path.suffix} files need the package {package}"
        raise UserError(what, where=str(path), fix=f"Install it: pip install {package}") from error
    except Exception as error:  # of zipfile, of XML parsers, and of both libraries
        raise UserError(
            f"not a readable spreadsheet: {first_line(error)}", where=str(path), fix="Save it again, or as .csv."
        ) from error
    frame = frame.loc[:, (frame != "").any()]
    rows = ((number, cells) for number, cells in enumerate(frame.values.tolist(), 1) if any(map(str.strip, cells)))
    yield from named_rows(rows, path, header=header, kind="row")
