"""Reads files, saved data sets, Hub data sets and the package's own data as a list of raw records. Used by `load`."""

from __future__ import annotations

import difflib
import importlib.resources
import itertools
import re
from pathlib import Path
from typing import Any

from tuna_peft.data.config import DataSource
from tuna_peft.data.csv_files import read_csv_rows
from tuna_peft.data.json_files import parse_line, read_json_units
from tuna_peft.errors import UserError

RawRecords = list[tuple[str, dict[str, Any]]]
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def read_records(source: DataSource) -> RawRecords:
    """The records of a source, each with its place.

    Lines and records count from 1 (`x.jsonl: line 12`, `x.csv: line 4`, `x.json: record 3`), rows of Parquet files and
    data sets from 0 (`id[train]: row 7`), as `dataset[7]` does.

    Raises:
        UserError: There is no such source, or it cannot be read.
    """
    builtin = source.path.startswith("builtin:")
    path = _builtin(source.path) if builtin else Path(source.path).expanduser()
    if not builtin and not path.exists() and _may_be_hub_id(source.path):
        records = _read_hub(source)
    else:
        for key in ("name", "revision"):
            if getattr(source, key) is not None:
                raise UserError(
                    f"`{key}` is for Hub data sets and has no effect on a file",
                    where=str(path),
                    fix=f"Remove `{key}`.",
                )
        records = _read_local(path, source)
    if not records:
        raise UserError(f"split `{source.split}` selects no records", where=source.path, fix="Use another `split`.")
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(
                f"expected an object with keys, found {type(record).__name__}: {str(record)[:40]!r}",
                where=where,
                fix='Each record is a JSON object, such as {"instruction": ..., "output": ...}.',
            )
    return records


def _read_local(path: Path, source: DataSource) -> RawRecords:
    if path.is_dir():
        return _read_saved(path, source)
    if not path.exists():
        raise _missing(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(
            f"unknown kind of file: {path.suffix or 'no extension'}",
            where=str(path),
            fix=f"Known kinds: {', '.join(_SUFFIXES)}. Convert it, or rename it if it is one of these.",
        )
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, source)
        table = path.suffix in (".csv", ".tsv")
        unit, units = ("row", read_csv_rows(path)) if table else read_json_units(path)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror or error}", where=str(path)) from error
    if not units:
        raise UserError("the file holds an empty list", where=str(path), fix="Check that what wrote it had finished.")
    chosen = [units[index] for _, index in _choose(source, {"train": len(units)})]
    if unit == "record":
        return [(f"{path}: record {number}", record) for number, record in chosen]
    if unit == "row":
        return [(f"{path}: line {number}", row) for number, row in chosen]
    last = units[-1][0]
    return [(f"{path}: line {number}", parse_line(path, number, line, last=number == last)) for number, line in chosen]


def _read_parquet(path: Path, source: DataSource) -> RawRecords:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"not a readable Parquet file: {_first_line(error)}",
            where=str(path),
            fix="It may be incomplete or of another kind: get it again, or check its extension.",
        ) from error
    if table.num_rows == 0:
        raise UserError("the file has no rows", where=str(path), fix="Check that what wrote it had finished.")
    chosen = [index for _, index in _choose(source, {"train": table.num_rows})]
    rows = table.take(pyarrow.array(chosen, pyarrow.int64())).to_pylist()
    return [(f"{path}: row {index}", row) for index, row in zip(chosen, rows, strict=True)]


def _read_saved(path: Path, source: DataSource) -> RawRecords:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and Arrow raise many types; each means that this is not a saved data set
        raise UserError(
            f"not a directory from `datasets.save_to_disk`: {_first_line(error)}",
            where=str(path),
            fix="Point `path` at a file in it, or save it again with `dataset.save_to_disk`.",
        ) from error
    if isinstance(saved, datasets.Dataset):
        # One data set is the split `train`, like a file, and also the split that it was saved from.
        splits = {name: saved for name in ("train", str(saved.split or "train"))}
    else:
        splits = dict(saved)
    chosen = _choose(source, {name: len(split) for name, split in splits.items()})
    records: RawRecords = []
    for name, run in itertools.groupby(chosen, key=lambda place: place[0]):
        indices = [index for _, index in run]
        rows = splits[name].select(indices)
        records += [(f"{path}[{name}]: row {index}", row) for index, row in zip(indices, rows, strict=True)]
    return records


def _read_hub(source: DataSource) -> RawRecords:
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # huggingface_hub, datasets, requests and Arrow each raise their own types
        raise _hub_error(source, error) from error
    if source.limit is not None:
        dataset = dataset.select(range(min(source.limit, len(dataset))))
    return [(f"{source.path}[{source.split}]: row {index}", row) for index, row in enumerate(dataset)]


def _choose(source: DataSource, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """Split name and row index of the records that `split` and `limit` select, rounded like `datasets` does.

    Args:
        source: Has `split` and `limit`.
        sizes: The number of rows of each split.
    """
    if source.split == "train" and "train" in sizes:
        chosen = [("train", index) for index in range(sizes["train"])]
    else:
        import datasets

        try:
            parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"split `{source.split}` is not possible: {_first_line(error)}",
                where=source.path,
                fix=f"Splits here: {', '.join(sorted(sizes))}; slices are written `train[:500]` or `train[90%:]`.",
            ) from error
        chosen = [(part.splitname, index) for part in parts for index in range(part.from_, part.to)]
    return chosen[: source.limit]


def count_selected(source: DataSource, rows: int) -> int:
    """The number of records that `split` and `limit` select, for planning without the data.

    Every split is assumed to have `rows` rows, or more if a slice refers to more.

    Raises:
        UserError: The split is not possible.
    """
    bounds = [int(bound) for bound in re.findall(r"[\[:-](\d+)(?=[:\]])", source.split)]
    size = max(rows, *bounds, 0)
    names = {part.partition("[")[0].strip() for part in source.split.split("+")}
    selected = len(_choose(source, dict.fromkeys(names, size)))
    # `[20000:]` with 20,000 rows selects none, so the split must have more: assume `rows` more.
    return selected or len(_choose(source, dict.fromkeys(names, size + rows)))


def _builtin(path: str) -> Path:
    name, _, file = path.removeprefix("builtin:").partition("/")
    folder = Path(str(importlib.resources.files("tuna_peft"))) / "assets" / name.replace("-", "_") / "data"
    if not file or ".." in Path(file).parts or not folder.is_dir():
        raise UserError(
            "there is no such data in the package", where=path, fix="It is written `builtin:pico-llama/<file>`."
        )
    return folder / file


def _may_be_hub_id(text: str) -> bool:
    """Whether a path that does not exist may name a Hub data set: `name` or `owner/name`."""
    path = Path(text)
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    return (
        len(path.parts) in (1, 2)
        and text[0] not in "./~\\"
        and path.suffix not in (*_SUFFIXES, ".txt")
        and not in_a_folder
    )


def _missing(path: Path) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError(
            f"the directory {folder} does not exist",
            where=str(path),
            fix="Relative paths start at the directory where the command runs.",
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES or entry.is_dir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        fix = f"Did you mean {' or '.join(near)}?"
    elif names:
        fix = f"In {folder} there are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
    else:
        fix = f"{folder} holds no data files."
    return UserError("there is no such file", where=str(path), fix=fix)


def _hub_error(source: DataSource, error: Exception) -> UserError:
    import datasets

    text = f"{type(error).__name__}: {error}"
    here = f"{source.path}[{source.split}]"
    offline = isinstance(error, OSError) and not isinstance(error, datasets.exceptions.DatasetNotFoundError)
    if "gated" in text.lower() or "401" in text or "403" in text:
        what = "the Hub data set is gated or private"
        fix = f"Accept its terms at https://huggingface.co/datasets/{source.path}, then run `hf auth login`."
    elif offline or "offline" in text.lower() or "reach" in text.lower():
        what = "the Hub cannot be reached, and the data set is not in the cache"
        fix = "Connect once (it is then read from the cache, also with HF_HUB_OFFLINE=1), or give a file as `path`."
    elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
        what = f"there is no such file, and no such data set on the Hub (or it is private): {_first_line(error)}"
        fix = "Check `path` and `revision`; for a private data set run `hf auth login`."
    else:
        what = f"the Hub data set cannot be read: {_first_line(error)}"
        fix = "Check `name`, `split` and `revision` on the data set's page."
    return UserError(what, where=here, fix=fix)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
