"""Rules that prose alone would not keep: install lines, extras, one spelling and standard terms."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DIARY = {DOCS / "log.md", ROOT / "CHANGELOG.md"}  # what was written at its time
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# American spelling, as in the keys and in the libraries.
BRITISH = r"(?i)\b\w*(?:quantis|tokenis|optimis|normalis|initialis|recognis|behaviour|licenc)\w*"
# Expressions with a standard term; docs/glossary.md has the terms.
HOME_MADE = {
    "refused by name": "rejected with an error", "let go of": "freed", "goes on where": "resumes",
    "to the same bytes": "byte-identical", "live stack": "unmerged adapters", "laid over": "overrides",
    "likelihood term": "SFT loss term", "logistic link": "logistic loss", "in silence": "silently",
}  # fmt: skip


def prose(file):
    """Text without code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "\n".join(
            cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown"
        )
    elif file.suffix == ".yaml":
        text = "\n".join(re.findall(r"#(.*)", text))
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


WRITTEN = [file for file in (*PAGES, *NOTEBOOKS) if file not in DIARY]


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_one_spelling_of_each_term(file):
    assert re.findall(BRITISH, prose(file)) == []


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_standard_terms(file):
    text = " ".join(prose(file).split())
    assert [f"{found}: say {better}" for found, better in HOME_MADE.items() if found in text] == []


def test_nothing_is_installed_by_a_name_that_is_not_ours():
    """`pip install tuna-peft` would install what somebody else may publish under this name."""
    files = [*PAGES, *NOTEBOOKS, *sorted((ROOT / "tuna_peft").rglob("*.py")), ROOT / "Makefile"]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if "pip install" in line]
    assert len(lines) > 15
    named = [line for line in lines if re.search(r"\btuna[-_]peft\b", line)]
    assert [line for line in named if not re.search(r" @ (git\+|\{source\})", line)] == []  # a name with its address


def test_the_table_of_extras_is_complete():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]\n")[1]
    extras = re.findall(r"^([\w-]+) = \[", project.split("\n[")[0], re.MULTILINE)
    listed = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(extras)


def test_where_the_promise_of_resuming_is_made():
    """Its conditions stand on one page; README repeats the sentence, and other pages link."""
    places = {file.name for file in DOCS.glob("*.md") if file not in DIARY and "uninterrupted run" in prose(file)}
    assert places == {"resume.md"}
