"""Markdown for model cards."""

from __future__ import annotations

import re
from collections.abc import Sequence


def section(title: str, text: str | None) -> str | None:
    """A section; None without a text."""
    return f"## {title}\n\n{text}" if text else None


def table(rows: Sequence[dict[str, str]]) -> str:
    """A table with a column for each key of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "").replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str = "") -> str:
    """A block of code, fenced by more backticks than it has in a row."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
