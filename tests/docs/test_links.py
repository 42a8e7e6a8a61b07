"""Links of README and docs lead to files and headings that exist; the site's menu has every page."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def text(page):
    """A page without its code."""
    whole = page.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", whole, flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """The ids that GitHub and Python-Markdown both give to headings of plain words."""
    whole = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", whole, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text(page)):
        file, _, anchor = target.partition("#")
        found = page if not file else page.parent / file
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), target
        if page.parent == ROOT / "docs":
            assert found.resolve().is_relative_to(ROOT / "docs"), f"{target}: the site holds docs/ only"


def test_the_menu_has_every_page():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for value in (entry.values() if isinstance(entry, dict) else entry) for file in files(value)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted([*files(site["nav"]), *site["not_in_nav"].split()]) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
    )
