"""Reads JSON and JSONL files; every error names its place. Used by `sources`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.json_text import Decoder, Rejected, parse_json

_CUT_FIX = "The file is incomplete, perhaps after an interrupted copy: get it again, or delete the incomplete record."


def read_json_units(path: Path) -> tuple[str, list[tuple[int, Any]]]:
    """The records of a JSON list, or the lines of a JSONL file; the content decides, not the extension.

    Returns:
        The kind of unit (`record` or `line`) and the units, each with its number from 1. Lines are still text, without
        blank ones, for `parse_line`: with `limit` or a slice only the selected lines are parsed.

    Raises:
        UserError: The file is empty, incomplete, not UTF-8, not JSON, or neither a list nor lines of objects.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError("the file is empty", where=str(path), fix="Check that what wrote it had finished.")
    if text.lstrip().startswith("["):
        try:
            return "record", list(enumerate(parse_json(text), 1))
        except ValueError as error:
            raise _error_in_list(path, text, error) from None
    if ".jsonl" not in path.suffixes:
        _refuse_one_object(path, text)
    # Not splitlines(): it also splits at U+2028 and its like, which JSON allows inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return "line", lines


def parse_line(path: Path, number: int, line: str, *, last: bool) -> Any:
    """Parses one line of JSONL; with `last`, the last line, an error may mean that the file is incomplete."""
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        where = f"{path}: line {number}"
        begun = line.lstrip().startswith("{")
        if last and begun and (error.pos >= len(line.rstrip()) or not line.rstrip().endswith("}")):
            what = f"the file ends in the middle of a record, after {len(line)} characters of this line"
            raise UserError(what, where=where, fix=_CUT_FIX) from None
        raise UserError(
            f"not valid JSON: {error.msg} at character {error.pos}, near {_near(line, error.pos)!r}",
            where=where,
            fix="A .jsonl file holds one JSON object per line, a .json file one list of objects.",
        ) from None
    except Rejected as error:
        raise UserError(str(error), where=f"{path}: line {number}", fix="Correct this line.") from None


def read_text(path: Path) -> str:
    """The text of a file without its byte order mark; UserError with the place of the first byte that is not UTF-8."""
    data = _read_bytes(path)
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0  # the byte order mark that some editors write
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + start
        line = data.count(b"\n", 0, offset) + 1
        if error.reason == "unexpected end of data":
            what = f"the file ends in the middle of a character, at byte {offset}, line {line}"
            raise UserError(what, where=str(path), fix=_CUT_FIX) from None
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise UserError(
            f"not UTF-8 text: byte 0x{data[offset]:02x} at byte {offset}, line {line}",
            where=str(path),
            fix="Save it as UTF-8 (a spreadsheet: as `CSV UTF-8`), or convert it, for example: "
            f"iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 IN > OUT",
        ) from None


def _read_bytes(path: Path) -> bytes:
    if path.suffix not in (".gz", ".zst"):
        return path.read_bytes()
    import pyarrow

    with pyarrow.input_stream(str(path), compression="detect") as stream:
        return bytes(stream.read())


def _refuse_one_object(path: Path, text: str) -> None:
    """Raises UserError for a single JSON value; returns for JSONL with another extension."""
    try:
        value = parse_json(text)
    except ValueError:
        return  # several lines of JSON, or an error that parse_line will report
    found = "a single value"
    if isinstance(value, dict):
        found = "one object with the keys " + ", ".join(f"`{key}`" for key in list(value)[:8])
        found += ", ..." if len(value) > 8 else ""
    raise UserError(
        f"the file holds {found}, not a list of records",
        where=str(path),
        fix="Write a list of objects ([{...}, {...}]), or one object per line in a .jsonl file.",
    )


def _error_in_list(path: Path, text: str, error: ValueError) -> UserError:
    """The error with the number of the invalid record, found by parsing the list again, one record at a time."""
    decoder, number, position = Decoder(), 0, text.index("[") + 1
    end = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
    with contextlib.suppress(ValueError):  # raised again, inside the invalid record
        while True:
            while position < end and text[position] in " \t\r\n,":
                position += 1
            if position >= end:
                break
            number += 1
            _, position = decoder.raw_decode(text, position)
    if not isinstance(error, json.JSONDecodeError):
        return UserError(str(error), where=f"{path}: record {number}", fix="Correct this record.")
    # Editors and `head -c` count bytes, Python counts characters.
    place = f"line {error.lineno}, byte {len(text[: error.pos].encode('utf-8', 'surrogatepass'))}"
    if error.pos >= len(text.rstrip()) or not text.rstrip().endswith("]"):
        what = f"the file ends in the middle of the list, in or after record {number} ({place})"
        return UserError(what, where=str(path), fix=_CUT_FIX)
    return UserError(
        f"not valid JSON: {error.msg} in or after record {number} ({place}), near {_near(text, error.pos)!r}",
        where=str(path),
        fix="Correct it there; `python -m json.tool FILE` shows the same place.",
    )


def _near(text: str, position: int) -> str:
    return text[max(0, position - 20) : position + 20]
