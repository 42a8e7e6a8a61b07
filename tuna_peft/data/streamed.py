"""Reads the first rows of a Hub data set that is too large to download, and keeps them. Used by `sources`."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuna_peft import files
from tuna_peft.data.config import DataSource
from tuna_peft.data.shards import open_shard


def read_streamed(path: str, source: DataSource) -> Iterator[dict[str, Any]]:
    """The first `limit` rows of a split, downloaded once.

    They are kept as Parquet in the cache of `datasets`, so that a run is resumed with the same rows, also offline and
    when the data set has changed.

    Args:
        path: The id of the data set.
        source: Has `limit` and a `split` without a slice, which `DataSource` checks.

    Raises:
        Exception: Of `datasets` and its libraries, as `load_dataset`.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    wanted = [path, source.name, source.split, source.revision, source.limit]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tuna_peft-streamed"
    cache = folder / f"{path.replace('/', '--')}-{digest}.parquet"
    if not cache.exists():
        stream = datasets.load_dataset(path, source.name, split=source.split, revision=source.revision, streaming=True)
        table = pyarrow.Table.from_pylist(list(itertools.islice(stream, source.limit)))
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(cache, buffer.getvalue())
    return (row for _, row in open_shard(cache).read(0, None))
