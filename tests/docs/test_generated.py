"""The generated pages are up to date."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("make_pages", DOCS / "make_pages.py")
make_pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_pages)


@pytest.mark.parametrize("page", make_pages.PAGES)
def test_up_to_date(page):
    hint = "run: python docs/make_pages.py"
    assert (DOCS / page).read_text(encoding="utf-8") == make_pages.PAGES[page](), hint


def test_every_option_is_in_the_reference():
    import typer

    from tuna_peft.cli.app import app

    text = (DOCS / "cli-reference.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        for path, leaf in make_pages._leaves(name, command):
            section = text.split(f"### tuna-peft {path}\n")[1].split("\n### ")[0]
            options = {option for parameter in leaf.params for option in parameter.opts if option.startswith("--")}
            assert [option for option in options - {"--help"} if f"`{option}`" not in section] == []


def test_the_tables_have_three_columns():
    rows = re.findall(r"^\|.*$", (DOCS / "cli-reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 100
    assert [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) != 4] == []
