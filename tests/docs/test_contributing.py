"""The files that CONTRIBUTING.md and AGENTS.md point at exist; "How to add" stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = "tuna_peft|tests|docs|benchmarks|recipes|notebooks|pico_world"


def files(text):
    return set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text))


@pytest.mark.parametrize(("page", "least"), [("CONTRIBUTING.md", 30), ("AGENTS.md", 10)])
def test_files_exist(page, least):
    found = files((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) >= least
    assert [file for file in sorted(found) if not (ROOT / file).exists()] == []


def test_the_map_lists_every_folder_of_the_package():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^      (\w+)/ ", text, re.MULTILINE))
    assert mapped == {folder.name for folder in (ROOT / "tuna_peft").iterdir() if any(folder.glob("*.py"))}


def test_how_to_add():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## How to add\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    recipes = {part.partition(".")[0]: part for part in re.split(r"^\*\*", section, flags=re.MULTILINE)[1:]}
    assert set(recipes) == {
        "A data format", "A loss", "A benchmark task", "A judge", "A GGUF architecture", "A recipe key",
    }  # fmt: skip
    for name, part in recipes.items():
        assert len(part.strip().splitlines()) <= 11, name  # a heading and at most ten lines
        assert any(file.startswith("tests/") for file in files(part)), name


def test_agents_md_is_short():
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()) < 80


def test_code_names_in_how_to_add_exist():
    """`FORMATS`, `make_judge` ...: names that a reader is sent to look for are in the files that the section names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## How to add\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    code = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files(section) if file.endswith(".py"))
    names = set(re.findall(r"`(_?[A-Z]\w*[a-z]\w*|[A-Z]{4,}|_?[a-z]+_[a-z_]+)`", section))
    assert len(names) > 10
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []
