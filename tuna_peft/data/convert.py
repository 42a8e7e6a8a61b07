"""Writes any readable source as a file of the ranked type."""

from __future__ import annotations

import io
import os
from pathlib import Path

from tuna_peft import files
from tuna_peft.data.as_dataset import ranked_dataset
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import read_ranked
from tuna_peft.data.ranked import ReadReport
from tuna_peft.errors import UserError


def convert(source: DataSource, prompt: PromptConfig, out_path: str | os.PathLike[str]) -> ReadReport:
    """Reads a source and writes it atomically as JSONL or Parquet, by the extension of `out_path`.

    Reading it back with `format: ranked` gives the same records.

    Raises:
        UserError: The extension is not known, `out_path` is the source itself, or see `load_ranked`.
    """
    out = Path(out_path)
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"cannot write {out.suffix or 'a file without an extension'}",
            where=str(out),
            fix="Use the extension .jsonl or .parquet.",
        )
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in source.paths):
        raise UserError("this is the source itself", where=str(out), fix="Write to another file.")
    records, report = read_ranked(source, prompt)
    if out.suffix == ".jsonl":
        files.write_jsonl(out, records)
    else:
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(ranked_dataset(records).with_format("arrow")[:], buffer)
        files.write_bytes(out, buffer.getvalue())
    return report
