"""Finds and opens data files: one file, or the shards in a folder or of a pattern such as `data/train-*.parquet`.

Used by `sources`. A file is opened without reading its records: only the ones that are chosen are parsed.
"""

from __future__ import annotations

import decimal
import glob
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tuna_peft.data.csv_files import read_csv_rows
from tuna_peft.data.json_files import parse_line, read_json_units
from tuna_peft.errors import UserError, first_line

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")

# Files that describe a data set, in folders of the Hub and of `datasets`.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# The Hub's names of splits, as words in the name of a file or folder.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


class Shard(NamedTuple):
    """An open data file.

    Attributes:
        size: Its number of records.
        read: From indices of records to pairs of place (`line 12`) and record.
    """

    size: int
    read: Callable[[Sequence[int]], Iterable[tuple[str, Any]]]


def is_hub_id(text: str) -> bool:
    """Whether the Hub allows such an id: `name` or `owner/name`, of at most 96 letters, digits and `-`, `_`, `.`."""
    return len(text) <= 96 and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text, re.ASCII) is not None


def data_suffix(path: Path) -> str:
    """The extension that tells the kind of a data file: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


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
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        if hidden or path.name in _DESCRIPTIONS or data_suffix(path) not in SUFFIXES or not path.is_file():
            continue
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


def _split_of(path: Path) -> str:
    if match := re.match(r"(.+?)[-_.]\d{2,5}-of-\d{2,5}", path.name):
        return match[1]
    words = (word for part in reversed(path.parts) for word in re.split(r"[^a-z]+", part.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


def open_shard(path: Path, *, header: bool = True) -> Shard:
    """Opens one file.

    Args:
        path: A file that exists.
        header: Whether the first line of a CSV file names the columns.

    Raises:
        UserError: It is of an unknown kind, cannot be read, or holds no records.
    """
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(
            f"unknown kind of file: {suffix or 'no extension'}",
            where=str(path),
            fix=f"Known kinds: {', '.join(SUFFIXES)}, and these with {' or '.join(COMPRESSED)}. "
            "Convert it, or rename it if it is one of these.",
        )
    try:
        if suffix == ".parquet":
            return _open_parquet(path)
        table = suffix in (".csv", ".tsv")
        unit, units = ("row", read_csv_rows(path, header=header)) if table else read_json_units(path)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror or error}", where=str(path)) from error
    if not units:
        raise UserError("the file holds an empty list", where=str(path), fix="Check that what wrote it had finished.")
    if unit == "line":
        last = units[-1][0]

        def parse(indices: Sequence[int]) -> Iterable[tuple[str, Any]]:
            for number, line in (units[index] for index in indices):
                yield f"line {number}", parse_line(path, number, line, last=number == last)

        return Shard(len(units), parse)
    name = "line" if unit == "row" else "record"
    return Shard(len(units), lambda indices: ((f"{name} {units[i][0]}", units[i][1]) for i in indices))


def _open_parquet(path: Path) -> Shard:
    import pyarrow
    import pyarrow.parquet

    try:
        size = pyarrow.parquet.read_metadata(path).num_rows
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from error
    if size == 0:
        raise UserError("the file has no rows", where=str(path), fix="Check that what wrote it had finished.")

    def read(indices: Sequence[int]) -> Iterable[tuple[str, Any]]:
        try:
            table = pyarrow.parquet.read_table(path)
            rows = table.take(pyarrow.array(indices, pyarrow.int64())).to_pylist()
        except Exception as error:  # Arrow's own types, and what Python says of text or dates that it cannot hold
            raise _not_parquet(path, error) from error
        if re.search(r"binary|decimal", str(table.schema.types)):
            rows = [plain(row, f"{path}: row {index}") for index, row in zip(indices, rows, strict=True)]
        return ((f"row {index}", row) for index, row in zip(indices, rows, strict=True))

    return Shard(size, read)


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
