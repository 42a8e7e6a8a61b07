"""Reads files, saved data sets, Hub data sets and the package's own data as raw records. Used by `load`."""

from __future__ import annotations

import difflib
import importlib.resources
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tuna_peft.data.bad_row import kind
from tuna_peft.data.config import DataSource
from tuna_peft.data.in_text import with_messages
from tuna_peft.data.shards import (
    SUFFIXES,
    address_fix,
    data_suffix,
    find_shards,
    is_hub_id,
    is_pattern,
    match_pattern,
    open_shard,
)
from tuna_peft.data.streamed import read_streamed
from tuna_peft.errors import UserError, first_line

RawRecords = Iterator[tuple[str, dict[str, Any]]]


def read_records(source: DataSource) -> RawRecords:
    """The records of a source, each with its place, read as they are asked for.

    Lines and records count from 1 (`x.jsonl: line 12`, `x.csv: line 4`, `x.json: record 3`), rows of Parquet files and
    data sets from 0 (`id[train]: row 7`), as `dataset[7]` does. In a folder or list of files the name of the file
    stands before them (`data: part2.jsonl line 12`).

    Raises:
        UserError: There is no such source, or it cannot be read.
    """
    if isinstance(source.path, str):
        return _read_path(source.path, source)
    parts = []
    for index, path in enumerate(source.path):
        # Places give records their ids, so they must differ between the files of a list.
        name = f"{Path(path).name}" + (f" ({index + 1})" if path in source.path[:index] else "")
        parts.append(_named(name, _read_path(path, source)))
    records = _mixed(parts, source.weights) if source.weights else itertools.chain(*parts)
    return itertools.islice(records, source.limit)


def _named(name: str, records: RawRecords) -> RawRecords:
    for where, record in records:
        head, _, rest = where.rpartition(": ")
        yield f"{head}: {name} {rest}", record


def _mixed(parts: list[RawRecords], weights: list[float]) -> RawRecords:
    """Takes from each part in proportion to its weight, in order, until one of them has no more records."""
    taken = [0] * len(parts)
    while True:
        # The part that is furthest behind its share comes next.
        index = min(range(len(parts)), key=lambda part: (taken[part] + 1) / weights[part])
        record = next(parts[index], None)
        if record is None:
            return
        yield record
        taken[index] += 1


def is_here(path: str | list[str]) -> bool:
    """Whether a path, or all of a list, is on this machine or in the package."""
    paths = [path] if isinstance(path, str) else path
    return all(one.startswith("builtin:") or Path(one).expanduser().exists() or bool(is_pattern(one)) for one in paths)


def _read_path(text: str, source: DataSource) -> RawRecords:
    if fix := address_fix(text):
        raise UserError("this is an address, not a path or the id of a Hub data set", where=text, fix=fix)
    builtin = text.startswith("builtin:")
    path = _builtin(text) if builtin else Path(text).expanduser()
    if not builtin and not path.exists() and not is_pattern(text) and _may_be_hub_id(text):
        records = _read_hub(text, source)
    else:
        for key in ("name", "revision", "streaming"):
            if getattr(source, key):
                raise UserError(
                    f"`{key}` is for Hub data sets and has no effect on a file",
                    where=str(path),
                    fix=f"Remove `{key}`.",
                )
        records = _read_local(path, source)
    none = True
    for where, record in itertools.islice(records, source.limit):
        none = False
        if not isinstance(record, dict):
            raise UserError(
                f"expected an object with keys, found {kind(record)}: {str(record)[:40]!r}",
                where=where,
                fix='Each record is a JSON object, such as {"instruction": ..., "output": ...}.',
            )
        yield where, with_messages(record)
    if none:
        raise UserError(f"split `{source.split}` selects no records", where=text, fix="Use another `split`.")


def _read_local(path: Path, source: DataSource) -> RawRecords:
    if is_pattern(str(path)):
        if not (files := match_pattern(str(path))):
            raise UserError(
                "no file matches the pattern",
                where=str(path),
                fix="Relative paths start at the directory where the command runs; `**` stands for any folders.",
            )
        return _read_shards(path, {"train": files}, source)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        shards = {} if saved else find_shards(path)
        return _read_shards(path, shards, source) if shards else _read_saved(path, source)
    if not path.exists():
        raise _missing(path)
    return _read_shards(path, {"train": [path]}, source)


def _read_shards(path: Path, splits: dict[str, list[Path]], source: DataSource) -> RawRecords:
    """The chosen records of one file, or of those of a folder or a pattern, by split; one file after the other."""
    shards = {name: [open_shard(file, header=source.header) for file in files] for name, files in splits.items()}
    several = path not in (file for files in splits.values() for file in files)
    for name, start, stop in _choose(source, splits, lambda name: sum(shard.size() for shard in shards[name])):
        first = 0
        for file, shard in zip(splits[name], shards[name], strict=True):
            begin, end = start, stop
            if start or stop is not None:  # the sizes tell which of the rows are in this file
                size = shard.size()
                begin, end = max(start - first, 0), min(size, size if stop is None else stop - first)
                first += size
            if end is None or begin < end:
                label = f"{path}: {file.name} " if several else f"{path}: "
                yield from ((label + place, record) for place, record in shard.read(begin, end))


def _read_saved(path: Path, source: DataSource) -> RawRecords:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and Arrow raise many types; each means that this is not a saved data set
        raise UserError(
            f"no data files in it, and not a directory from `datasets.save_to_disk`: {first_line(error)}",
            where=str(path),
            fix=f"Known kinds of files: {', '.join(SUFFIXES)}. A data set is saved with `dataset.save_to_disk`.",
        ) from error
    if isinstance(saved, datasets.Dataset):
        # One data set is the split `train`, like a file, and also the split that it was saved from.
        splits = {name: saved for name in ("train", str(saved.split or "train"))}
    else:
        splits = dict(saved)
    for name, start, stop in _choose(source, splits, lambda name: len(splits[name])):
        rows = splits[name].select(range(start, len(splits[name]) if stop is None else stop))
        try:
            for index, row in enumerate(rows, start):
                yield f"{path}[{name}]: row {index}", row
        except Exception as error:  # images, audio and damaged files are only decoded now
            raise UserError(f"the data set cannot be read: {first_line(error)}", where=f"{path}[{name}]") from error


def _read_hub(path: str, source: DataSource) -> RawRecords:
    import datasets

    try:
        if source.streaming:
            rows = read_streamed(path, source)
        else:
            rows = datasets.load_dataset(path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # huggingface_hub, datasets, requests and Arrow each raise their own types
        raise _hub_error(path, source, error) from error
    return ((f"{path}[{source.split}]: row {index}", row) for index, row in enumerate(rows))


def _choose(
    source: DataSource, names: Collection[str], size: Callable[[str], int]
) -> list[tuple[str, int, int | None]]:
    """The records that `split` selects, rounded like `datasets` does: name of a split, first row, and row to stop at.

    The rows end at None if they are all, which nobody has to count.

    Args:
        source: Has `split`.
        names: The splits that there are.
        size: Counts the rows of one of them.
    """
    parts = [part.strip() for part in source.split.split("+")]
    if all(part in names for part in parts):
        return [(part, 0, None) for part in parts]
    import datasets

    wanted = {part.partition("[")[0].strip() for part in parts}
    try:
        sizes = {name: size(name) if name in wanted else 0 for name in names}
        chosen = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"split `{source.split}` is not possible: {first_line(error)}",
            where=source.title,
            fix=f"Splits here: {', '.join(sorted(names))}; slices are written `train[:500]` or `train[90%:]`.",
        ) from error
    return [(part.splitname, part.from_, part.to) for part in chosen]


def count_selected(source: DataSource, rows: int) -> int:
    """The number of records that `split` and `limit` select, for planning without the data.

    Every split is assumed to have `rows` rows, or more if a slice refers to more.

    Raises:
        UserError: The split is not possible.
    """
    bounds = [int(bound) for bound in re.findall(r"[\[:-](\d+)(?=[:\]])", source.split)]
    names = {part.partition("[")[0].strip() for part in source.split.split("+")}

    def selected(size: int) -> int:
        chosen = _choose(source, names, lambda name: size)
        found = sum((size if stop is None else stop) - start for _, start, stop in chosen)
        return min(found, source.limit or found)

    size = max(rows, *bounds, 0)
    # `[20000:]` with 20,000 rows selects none, so the split must have more: assume `rows` more.
    return selected(size) or selected(size + rows)


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
    return is_hub_id(text) and text[0] != "." and data_suffix(path) not in (*SUFFIXES, ".txt") and not in_a_folder


def _missing(path: Path) -> UserError:
    folder = path.parent
    if path.is_symlink():
        what = f"this is a link to {path.readlink()}, which does not exist or links back to it"
        return UserError(what, where=str(path), fix="Correct the link, or give the file itself as `path`.")
    if not folder.is_dir():
        return UserError(
            f"the directory {folder} does not exist",
            where=str(path),
            fix="Relative paths start at the directory where the command runs.",
        )
    names = sorted(entry.name for entry in folder.iterdir() if data_suffix(entry) in SUFFIXES or entry.is_dir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        fix = f"Did you mean {' or '.join(near)}?"
    elif names:
        fix = f"In {folder} there are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
    else:
        fix = f"{folder} holds no data files."
    return UserError("there is no such file", where=str(path), fix=fix)


def _hub_error(path: str, source: DataSource, error: Exception) -> UserError:
    import datasets

    text = f"{type(error).__name__}: {error}"
    here = f"{path}[{source.split}]"
    offline = isinstance(error, OSError) and not isinstance(error, datasets.exceptions.DatasetNotFoundError)
    if "gated" in text.lower() or "401" in text or "403" in text:
        what = "the Hub data set is gated or private"
        fix = f"Accept its terms at https://huggingface.co/datasets/{path}, then run `hf auth login`."
    elif offline or "offline" in text.lower() or "reach" in text.lower():
        what = "the Hub cannot be reached, and the data set is not in the cache"
        fix = "Connect once (it is then read from the cache, also with HF_HUB_OFFLINE=1), or give a file as `path`."
    elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
        what = f"there is no such file, and no such data set on the Hub (or it is private): {first_line(error)}"
        fix = "Check `path` and `revision`; for a private data set run `hf auth login`."
    else:
        what = f"the Hub data set cannot be read: {first_line(error)}"
        fix = "Check `name`, `split` and `revision` on the data set's page."
    return UserError(what, where=here, fix=fix)
