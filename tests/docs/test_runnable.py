"""The commands of README.md and docs/ that are marked as runnable run, in order, in an empty folder."""

import pytest
from shell_blocks import commands, marked_pages, run_command

SLOW = [page for page in marked_pages() if page != "README.md"]


def test_some_pages_have_commands():
    assert {"README.md", "docs/index.md", "docs/own-data.md"} <= set(marked_pages())


def test_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command("tuna-peft run quickstart --output runs/quickstart")  # as `make quickstart` does
    seen = {words[1] for words in map(run_command, commands("README.md")) if words[0] == "tuna-peft"}
    assert {"run", "data", "plan", "generate", "merge", "export", "push"} <= seen
    assert (tmp_path / "mine-merged" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        run_command(command)
