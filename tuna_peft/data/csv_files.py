"""Reads CSV and TSV files with a header; every error names its line. Used by `sources`."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuna_peft.data.json_files import open_text
from tuna_peft.errors import UserError

_DELIMITERS = ",;\t|"  # in many languages, spreadsheets write .csv files with semicolons
_LARGEST_CELL = 2**31 - 1  # characters; the largest limit that Python accepts on every platform
_ROWS = 1000  # read at a time, because the limit is one of the whole process
_LONGEST_NAME = 100  # characters of a column's name; a longer cell in the header is data


def csv_rows(path: Path, *, header: bool = True) -> Iterator[tuple[int, Any]]:
    """The rows after the header, each with the number of its first line (the header is line 1), as they are asked for.

    Values are text; an empty cell is None. The delimiter (comma, semicolon, tab or |) is detected from the first line,
    unless that names it (Excel's `sep=;`).

    Args:
        path: The file.
        header: False: the first line is a row too, and the columns are called `1`, `2`, ...

    Raises:
        UserError: The file is empty or not UTF-8, has no usable header, or a row has another number of
            cells.
    """
    return named_rows(_cells(path), path, header=header)


def named_rows(
    rows: Iterator[tuple[int, list[str]]], path: Path, *, header: bool, kind: str = "line"
) -> Iterator[tuple[int, Any]]:
    """The rows of a table as records, for `csv_rows` and for spreadsheets; their errors.

    Args:
        rows: The number of a row and its cells; the first row is the header if there is one.
        path: The file, for messages.
        header: See `csv_rows`.
        kind: What the number counts.
    """
    first = next(rows, None)
    if first is None:
        raise UserError("the file is empty", where=str(path), fix="Check that what wrote it had finished.")
    names = [name.strip() for name in first[1]]
    if names[0] == "" and all(names[1:]) and (second := next(rows, None)):
        rows = itertools.chain([second], rows)
        names[0] = "(index)" if second[1][0] == "0" else ""  # the column that pandas adds
    if header:
        _refuse_data(names, path)
    else:
        rows, names = itertools.chain([first], rows), [str(number) for number in range(1, len(names) + 1)]
    counts = Counter(names)
    if twice := sorted({name or "(empty)" for name in names if not name or counts[name] > 1}):
        raise UserError(
            f"each column of the header needs a different name; missing or repeated: {', '.join(twice[:10])}",
            where=f"{path}: {kind} 1",
            fix="Name the columns; if this line is data already, write `header: false` and number them from 1.",
        )
    for number, cells in rows:
        if len(cells) != len(names):
            raise UserError(
                f"{len(cells)} cells, but the {'header' if header else 'first row'} has {len(names)}",
                where=f"{path}: {kind} {number}",
                fix="Put cells that contain a comma or a line break in double quotes.",
            )
        yield number, {name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)}


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    with open_text(path) as stream:
        first = next((line for line in stream if line.strip("\r\n")), "").rstrip("\r\n")
    named = re.fullmatch("sep=(.)", first)
    bare = re.sub(r'"[^"]*"', "", first)  # a name in quotes may hold any of them
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    delimiter = named[1] if named else "\t" if tabs else max(_DELIMITERS, key=bare.count)
    with open_text(path, newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        line, rows = 1, [(0, [""])]
        if named:
            next(reader)
            line = 2
        while rows:
            rows = []
            limit = csv.field_size_limit(_LARGEST_CELL)  # the default, 131,072, is shorter than some responses
            try:
                for cells in itertools.islice(reader, _ROWS):
                    rows.append((line, cells))
                    line = reader.line_num + 1
            except csv.Error as error:
                raise UserError(
                    f"not valid CSV: {error}",
                    where=f"{path}: line {line}",
                    fix="Put cells with commas, line breaks or quotes in double quotes, and write a quote inside them "
                    'as "".',
                ) from None
            finally:
                csv.field_size_limit(limit)
            yield from (row for row in rows if any(cell.strip() for cell in row[1]))


def _refuse_data(names: list[str], path: Path) -> None:
    """Raises UserError for a first line that is a row of data: a text of some length, or numbers beside text."""
    numbers = [name for name in names if re.fullmatch(r"-?\d+([.,]\d+)?", name)]
    long = [name for name in names if len(name) > _LONGEST_NAME or "\n" in name]
    if long or 0 < len(numbers) < len(names):
        cell = (long or numbers)[0]
        raise UserError(
            f"the first line is no header: {cell[:40]!r} is not the name of a column",
            where=f"{path}: line 1",
            fix="Put a line with the names of the columns before it, or write `header: false` (`--no-header`) and "
            "number the columns from 1: `columns: {instruction: 1, completions: [2, 3], scores: [4, 5]}`.",
        )
