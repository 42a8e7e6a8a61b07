"""docs/notebooks/: pages show the cells of the notebooks as they are now."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_and_pictures(path):
    page = ROOT / "docs" / "notebooks" / f"{path.stem}.md"
    text = page.read_text(encoding="utf-8")
    code = iter(re.findall(r"^```python\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # in order; the page may have parameters of its own between
            assert cell.source in code, f"{cell.id}: run `python docs/make_notebooks.py {page.stem}`"
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert sorted(pictures) == sorted(file.name for file in page.parent.glob(f"{page.stem}*.png"))
    assert not re.search(r"\x1b|\r|/tmp/|site-packages", text)
