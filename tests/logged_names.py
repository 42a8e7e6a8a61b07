"""Which names of metrics docs/output-files.md explains."""

import re
from collections.abc import Iterable
from pathlib import Path

_PAGE = (Path(__file__).parents[1] / "docs" / "output-files.md").read_text(encoding="utf-8")


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of `names` that no table of the page has; `scores/rank_1` stands for all lower ranks."""
    rows = "\n".join(re.findall(r"^\| (`.*?) \|", _PAGE, re.MULTILINE))
    plain = {name: re.sub(r"(?<=/rank_)[1-9]\d*$", "1", re.sub(r"^(eval|test)_", "", name)) for name in names}
    return sorted(name for name, written in plain.items() if f"`{written}`" not in rows)
