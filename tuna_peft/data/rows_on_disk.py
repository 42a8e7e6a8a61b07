"""Tokenized rows in a temporary Arrow file, so that their number is bounded by the disk and not by memory."""

from __future__ import annotations

import atexit
import contextlib
import functools
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuna_peft import files

if TYPE_CHECKING:
    import datasets


@functools.cache
def _folder() -> Path:
    """A folder that is deleted when this process ends, or, if it is killed, when the next one comes here."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(files.temporary_directory(Path(tempfile.gettempdir()) / "tuna_peft-rows"))


def write_rows(chunks: Iterable[list[dict[str, Any]]], features: dict[str, Any]) -> datasets.Dataset:
    """The rows as a data set on the disk, in the temporary folder of this machine (`TMPDIR`).

    Args:
        chunks: The rows, a part at a time.
        features: The type of each column. A column that no row has is left out; a row that lacks one has None there.

    Raises:
        UserError: The disk is full.
    """
    import datasets
    import pyarrow

    path, present = _folder() / f"{uuid.uuid4().hex}.arrow", set()
    schema = datasets.Features(features).arrow_schema
    with (
        files.disk_full_is_a_user_error(path),
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_stream(sink, schema) as writer,
    ):
        for rows in chunks:
            present |= {name for row in rows for name in row}
            columns = {name: [row.get(name) for row in rows] for name in features}
            writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema))
    written = datasets.Dataset.from_file(str(path))
    return written.remove_columns([name for name in features if name not in present])
