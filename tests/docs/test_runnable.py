"""The commands of README.md, AGENTS.md and docs/ that are marked as runnable run, in order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shell_blocks import ROOT, commands, marked_pages, run_command

SLOW = [page for page in marked_pages() if page not in ("README.md", "AGENTS.md")]


def test_some_pages_have_commands():
    assert {"README.md", "docs/quickstart.md", "docs/own-data.md"} <= set(marked_pages())


def test_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command("tuna-peft run quickstart --output runs/quickstart")  # as `make quickstart` does
    seen = {words[1] for words in map(run_command, commands("README.md")) if words[0] == "tuna-peft"}
    assert {"run", "data", "plan", "generate", "merge", "export", "push"} <= seen
    assert (tmp_path / "mine-merged" / "model.safetensors").exists()


def test_what_agents_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {words[1] for words in map(run_command, commands("AGENTS.md"))}
    assert {"recipes", "schema", "run", "data", "plan", "generate"} == seen


def test_agents_md_shows_no_other_commands():
    page = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    rest = re.sub(r"^```sh\n.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    assert "`sample`" in rest  # names of commands may stand in the text, whole commands may not
    assert re.findall(r"(?:`|^ {4})(?:tuna-peft|python|pytest|make|pip) [^-][^`\n]*", rest, re.MULTILINE) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("AGENTS.md", in_repository=True))
def test_what_agents_check(command):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True, cwd=ROOT, env={**os.environ, "PATH": path})


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        run_command(command)
