"""Executes notebooks/ and writes what they show: `python docs/make_notebooks.py [FIRST_LETTERS]`. Minutes on a CPU.

Each notebook becomes `docs/notebooks/<name>.md` with its pictures beside it, so that the site and the repository show
results without an installation. A test compares the cells of pages and notebooks.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
NOTEBOOKS = sorted((DOCS.parent / "notebooks").glob("*.ipynb"))
LISTS = {"path": "builtin:pico-llama/teacher.json", "limit": 240}
# What is set for these pages: a model and data that need no download. The other notebooks run as they are.
PARAMETERS: dict[str, dict[str, Any]] = {
    "2_two_stages_in_4_bits": {
        "MODEL": "builtin:pico-llama", "TEMPLATE": "alpaca", "TEACHER": "builtin:pico-llama", "TRAIN": LISTS,
        "HELD_OUT": LISTS, "RATE": 1e-3, "MAX_LENGTH": 256,
    },
}  # fmt: skip
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BAR = re.compile(r"\d%\|")


def tagged(notebook: Any, tag: str) -> int:
    [place] = [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", ())]
    return place


def execute(path: Path, folder: Path) -> Any:
    """The notebook with its outputs. The cell that installs does not run; `PARAMETERS` replace the notebook's."""
    notebook = nbformat.read(path, as_version=4)
    install = tagged(notebook, "install")
    if path.stem in PARAMETERS:
        given = "\n".join(f"{name} = {value!r}" for name, value in PARAMETERS[path.stem].items())
        cell = nbformat.v4.new_code_cell("# For this page: nothing to download.\n" + given)
        notebook.cells.insert(tagged(notebook, "parameters") + 1, cell)
    skipped = notebook.cells.pop(install)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.cells.insert(install, skipped)
    return notebook


def text_of(output: Any) -> str:
    """What a terminal shows in the end: no control sequences, no line that was overwritten, no bars."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    lines = [line.rstrip().rsplit("\r", 1)[-1].rstrip() for line in _CONTROL.sub("", text).split("\n")]
    lines = [line for line in lines if not _BAR.search(line)]
    return "\n".join(lines).strip("\n")


def page(notebook: Any, path: Path) -> str:
    """The notebook as Markdown; its pictures are written to docs/notebooks/."""
    parts, pictures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                pictures += 1
                name = f"{path.stem}-{pictures}.png"
                (DOCS / "notebooks" / name).write_bytes(base64.b64decode(output["data"]["image/png"]))
                parts.append(f"![What this cell draws]({name})")
            elif output.get("name") != "stderr" and (text := text_of(output)):  # no warnings
                parts.append(f"```text\n{text}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n*`notebooks/{path.name}`, executed on a CPU by `python docs/make_notebooks.py`.*\n{rest}\n"


def main() -> None:
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    (DOCS / "notebooks").mkdir(exist_ok=True)
    for path in NOTEBOOKS:
        if path.name.startswith(tuple(sys.argv[1:] or [""])):
            with tempfile.TemporaryDirectory() as folder:
                done = page(execute(path, Path(folder)), path)
            (DOCS / "notebooks" / f"{path.stem}.md").write_text(done, encoding="utf-8")
            print(f"wrote docs/notebooks/{path.stem}.md")


if __name__ == "__main__":
    main()
