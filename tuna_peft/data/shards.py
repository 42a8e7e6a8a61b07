"""Finds and opens data files: one file, or the shards in a folder or of a pattern such as `data/train-*.parquet`.

Used by `sources`. Records are read as they are asked for: memory does not grow with a file, and lines that are not
chosen are not parsed.
"""

from __future__ import annotations

import contextlib
import decimal
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tuna_peft.data.csv_files import csv_rows
from tuna_peft.data.json_files import COMPRESSIONS, json_units, parse_line
from tuna_peft.data.spreadsheets import sheet_rows
from tuna_peft.errors import UserError, first_line
from tuna_peft.files import INSTEAD_OF_A_FILE

SPREADSHEETS = (".xlsx", ".ods")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", *SPREADSHEETS)
COMPRESSED = tuple(COMPRESSIONS)
_BATCH = 1024  # rows of a Parquet file in memory at a time

# Files that describe a data set, in folders of the Hub and of `datasets`.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# The Hub's names of splits, as words in the name of a file or folder.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


Count = Callable[[Path, bool], int]
Read = Callable[[Path, bool, int, int | None], Iterator[tuple[str, Any]]]


@dataclass(frozen=True)
class Shard:
    """A data file.

    Attributes:
        size: Counts its records.
        read: From the index of the first record, and of the one after the last (None: all that follow), to pairs of
            place (`line 12`) and record.
    """

    size: Callable[[], int]
    read: Callable[[int, int | None], Iterator[tuple[str, Any]]]


def is_hub_id(text: str) -> bool:
    """Whether the Hub allows such an id: `name` or `owner/name`, of at most 96 letters, digits and `-`, `_`, `.`."""
    return len(text) <= 96 and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text, re.ASCII) is not None


def address_fix(text: str) -> str | None:
    """What to write in the place of an address such as `https://...`; None for anything else."""
    if "://" not in text:
        return None
    on_hub = re.search(r"(?:huggingface\.co|hf\.co|^hf:/)/(?:datasets/)?([\w.-]+(?:/[\w.-]+)?)", text)
    return f"Write `{on_hub[1]}`." if on_hub else "Download it, and give the path of the file or folder."


def data_suffix(path: Path) -> str:
    """The extension that tells the kind of a data file: `.jsonl` for `a.jsonl.gz`."""
    suffix = path.suffix.lower()  # Windows writes .CSV
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def is_pattern(text: str) -> bool:
    """Whether a path that does not exist contains `*`, `?` or `[`."""
    return glob.has_magic(text) and not Path(text).expanduser().exists()


def match_pattern(text: str) -> list[Path]:
    """The files of a pattern, sorted by name; `**` stands for any folders."""
    return sorted(
        path for name in glob.glob(str(Path(text).expanduser()), recursive=True) if (path := Path(name)).is_file()
    )


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """The data files in a folder and its subfolders, sorted by name, by split.

    The split is what stands before `-00000-of-00002`, else the Hub's word for a split in the name of the file or of
    its folder (`test.jsonl`, `dev/part1.csv`), else `train`.

    Raises:
        UserError: The files are of several kinds, so that it is not clear which ones are meant.
    """
    splits: dict[str, list[Path]] = {}
    kinds: dict[str, str] = {}
    for path in sorted(path for path in _visible_files(folder) if data_suffix(path) in SUFFIXES and path.is_file()):
        kinds.setdefault(data_suffix(path), path.name)
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if len(kinds) > 1:
        examples = ", ".join(kinds.values())
        raise UserError(
            f"the folder holds data files of several kinds: {examples}",
            where=str(folder),
            fix=f"Name the ones to read with a pattern, for example `path: {folder}/**/*{min(kinds)}`.",
        )
    return splits


def _visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones and descriptions; hidden folders, such as .git, are not entered."""
    for place, folders, names in os.walk(folder):
        folders[:] = (name for name in folders if not name.startswith((".", "_")))
        yield from (
            Path(place, name) for name in names if not name.startswith((".", "_")) and name not in _DESCRIPTIONS
        )


def _split_of(path: Path) -> str:
    if match := re.match(r"(.+?)[-_.]\d{2,5}-of-\d{2,5}", path.name):
        return match[1]
    words = (word for part in reversed(path.parts) for word in re.split(r"[^a-z]+", part.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


def open_shard(path: Path, *, header: bool = True) -> Shard:
    """A file that exists, to be read.

    Args:
        path: The file.
        header: Whether the first line of a CSV file names the columns.

    Raises:
        UserError: It is of an unknown kind; when it is read: it cannot be read, or holds no records.
    """
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(
            f"unknown kind of file: {suffix or 'no extension'}",
            where=str(path),
            fix=f"Known kinds: {', '.join(SUFFIXES)}, and these with {' or '.join(COMPRESSED)}. "
            "Convert it, or rename it if it is one of these.",
        )
    count, rows = _KINDS.get(suffix, (_count_json, _read_json))

    def size() -> int:
        return count(path, header) or _no_records(path)

    def read(start: int, stop: int | None) -> Iterator[tuple[str, Any]]:
        _refuse_other_content(path)
        found = rows(path, header, start, stop)
        first = next(found, None)
        if first is not None:
            yield first
        elif start == 0 and stop != 0:
            _no_records(path)
        yield from found

    return Shard(size, read)


# How files begin that often bear the name of another kind, what they are, and what to do.
_CONTENTS = (
    *INSTEAD_OF_A_FILE,
    (b"\x1f\x8b", "compressed by gzip", "Add .gz to its name."),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "Add .zst to its name."),
    (b"PK\x03\x04", "an archive (zip or .xlsx)", "Unpack it, or call it .xlsx if it is a spreadsheet."),
    (b"PAR1", "a Parquet file", "Call it .parquet."),
)
_OWN = {".parquet": b"PAR1", ".xlsx": b"PK", ".ods": b"PK", ".gz": b"\x1f\x8b", ".zst": b"\x28\xb5"}


def _refuse_other_content(path: Path) -> None:
    """Raises UserError for a file that is something else than its name says, and for one that cannot be read twice."""
    if not path.is_file():
        raise UserError("this is no regular file", where=str(path), fix="Write the data to a file first.")
    with contextlib.suppress(OSError), path.open("rb") as stream:
        begin = stream.read(32)
        own = _OWN.get(path.suffix.lower(), b"\0")
        for magic, what, fix in _CONTENTS:
            if begin.startswith(magic) and not magic.startswith(own):
                raise UserError(f"this is {what}", where=str(path), fix=fix)


def _no_records(path: Path) -> NoReturn:
    raise UserError("the file holds no records", where=str(path), fix="Check that what wrote it had finished.")


def _count_json(path: Path, header: bool) -> int:
    return sum(1 for _ in json_units(path)[1])


def _read_json(path: Path, header: bool, start: int, stop: int | None) -> Iterator[tuple[str, Any]]:
    kind, units = json_units(path)
    for number, unit, last in itertools.islice(units, start, stop):
        yield f"{kind} {number}", parse_line(path, number, unit, last=last) if kind == "line" else unit


def _table(rows: Callable[..., Iterator[tuple[int, Any]]], unit: str) -> tuple[Count, Read]:
    """For `csv_rows` and `sheet_rows`; `unit` is what they number."""

    def read(path: Path, header: bool, start: int, stop: int | None) -> Iterator[tuple[str, Any]]:
        chosen = itertools.islice(rows(path, header=header), start, stop)
        return ((f"{unit} {number}", row) for number, row in chosen)

    return lambda path, header: sum(1 for _ in rows(path, header=header)), read


def _count_parquet(path: Path, header: bool) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from error


def _read_parquet(path: Path, header: bool, start: int, stop: int | None) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        file, first = pyarrow.parquet.ParquetFile(path), 0
        typed = re.search(r"binary|decimal", str(file.schema_arrow.types))
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if start < end and (stop is None or first < stop):
                for batch in file.iter_batches(_BATCH, row_groups=[group]):
                    for index, row in enumerate(batch.to_pylist(), first):
                        if start <= index and (stop is None or index < stop):
                            yield f"row {index}", plain(row, f"{path}: row {index}") if typed else row
                    first += batch.num_rows
            first = end
    except UserError:
        raise
    except Exception as error:  # Arrow's own types, and what Python says of text or dates that it cannot hold
        raise _not_parquet(path, error) from error


# How to count and to read the records of a kind of file; all others are JSON.
_KINDS = {
    **dict.fromkeys((".csv", ".tsv"), _table(csv_rows, "line")),
    ".parquet": (_count_parquet, _read_parquet),
    **dict.fromkeys(SPREADSHEETS, _table(sheet_rows, "row")),
}


def plain(value: Any, where: str) -> Any:
    """A value of Arrow with text for bytes and numbers for decimals.

    Raises:
        UserError: The bytes are not UTF-8 text, such as an image.
    """
    if isinstance(value, dict):
        return {key: plain(entry, f"{where}, `{key}`") for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry, where) for entry in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{len(value)} bytes that are not UTF-8 text", where=where, fix="Remove the column from the file."
            ) from None
    return value


def _not_parquet(path: Path, error: Exception) -> UserError:
    return UserError(
        f"not a readable Parquet file: {first_line(error)}",
        where=str(path),
        fix="It may be incomplete or of another kind: get it again, or check its extension.",
    )
