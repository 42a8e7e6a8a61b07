"""Reads JSON and JSONL files; every error names its place. Used by `sources`."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tuna_peft.errors import UserError
from tuna_peft.json_text import Decoder, Rejected, parse_json

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_WINDOW = 1 << 20  # characters of a list that are decoded at a time
_CUT_FIX = "The file is incomplete, perhaps after an interrupted copy: get it again, or delete the incomplete record."


def json_units(path: Path) -> tuple[str, Iterator[tuple[int, Any, bool]]]:
    """The records of a JSON list, or the lines of a JSONL file; the content decides, not the extension.

    Both are read as they are asked for, so that memory does not grow with the file.

    Returns:
        The kind of unit (`record` or `line`), and for each its number from 1, the record or the text of the line (for
        `parse_line`; blank ones are left out), and whether it is the last one.

    Raises:
        UserError: The file is empty, incomplete, not UTF-8, not JSON, or neither a list nor lines of objects; for what
            is wrong further down, when it is reached.
    """
    with open_text(path) as stream:
        beginning = _first_text(stream)
    if not beginning:
        raise UserError("the file is empty", where=str(path), fix="Check that what wrote it had finished.")
    if beginning.startswith("["):
        return "record", _marked(_records(path))
    if not {".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes}:
        _refuse_one_object(path)
    return "line", _marked(_lines(path))


def _first_text(stream: TextIO) -> str:
    """A part of the text that begins with its first character that is not white space; empty without one."""
    while text := stream.read(_WINDOW):
        if text := text.lstrip():
            break
    return text


def _marked(units: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any, bool]]:
    """The units, each with whether it is the last one."""
    before = next(units, None)
    while before is not None:
        following = next(units, None)
        yield *before, following is None
        before = following


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_text(path) as stream:
        yield from ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a list, decoded from a part of the text that grows until it holds the next one."""
    decoder, number = Decoder(), 0
    with open_text(path) as stream:
        text, start = _first_text(stream), 1  # after the bracket
        while True:
            separator = re.compile(r"\s*,\s*" if number else r"\s*").match(text, start)
            try:
                record, end = decoder.raw_decode(text, separator.end()) if separator else (None, len(text))
            except ValueError:  # the record goes on, or it is wrong: the whole text will tell
                end = len(text)
            if end < len(text):
                number, start = number + 1, end
                yield number, record
            elif more := stream.read(max(_WINDOW, len(text) - start)):
                text, start = text[start:] + more, 0
            else:
                break
    if text[start:].strip() != "]":
        whole = read_text(path)
        try:
            yield from itertools.islice(enumerate(parse_json(whole), 1), number, None)
        except ValueError as error:
            raise _error_in_list(path, whole, error) from None


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


@contextlib.contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """The text of a file, perhaps compressed, without its byte order mark.

    Lines end at `newline` only: U+2028 and its like are allowed inside a string of JSON.

    Raises:
        UserError: The file cannot be read, or is not UTF-8.
    """
    try:
        with _open_bytes(path) as data, io.TextIOWrapper(data, encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError:
        read_text(path)  # raises, with the place
        raise
    except OSError as error:
        fix = "Is it complete, and compressed as its name says?" if path.suffix.lower() in COMPRESSIONS else None
        raise UserError(f"cannot read the file: {error.strerror or error}", where=str(path), fix=fix) from error


def read_text(path: Path) -> str:
    """The text of a file without its byte order mark; UserError with the place of the first byte that is not UTF-8."""
    with _open_bytes(path) as stream:
        data = stream.read()
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
            f"iconv -f {'UTF-16' if utf16 else 'CP1252'} -t UTF-8 IN > OUT",
        ) from None


def _open_bytes(path: Path) -> Any:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, "rb")
    import pyarrow

    return pyarrow.input_stream(str(path), compression=compression)


def _refuse_one_object(path: Path) -> None:
    """Raises UserError for a file with a single JSON value; returns for JSONL with another extension."""
    lines = _lines(path)
    with contextlib.suppress(ValueError):
        parse_json(next(lines)[1])
        if next(lines, None) is not None:
            return
    try:
        value = parse_json(read_text(path))
    except ValueError:
        return  # several lines of JSON, or an error that parse_line will report
    found = "a single value"
    if isinstance(value, dict):
        found = "one object with the keys " + ", ".join(f"`{key}`" for key in list(value)[:8])
        found += ", ..." if len(value) > 8 else ""
    raise UserError(
        f"the file holds {found}, not a list of records",
        where=str(path),
        fix="Write a list of objects ([{...}, {...}]), or one object per line in a .jsonl file; with pandas: "
        '`to_json(..., orient="records", lines=True)`.',
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
