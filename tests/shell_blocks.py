"""Runs the shell blocks of a page that follow `<!-- runnable -->`, as they stand there, line by line."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^<!-- runnable(?P<note>[^>]*) -->\n```sh\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
_HEREDOC = re.compile(r"<<'(\w+)'$")


def marked_pages() -> list[str]:
    """README, AGENTS and docs that have such blocks."""
    pages = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page.relative_to(ROOT).as_posix() for page in pages if _BLOCK.search(page.read_text(encoding="utf-8"))]


IN_REPOSITORY = ": in the repository"


def commands(page: str, *, in_repository: bool = False) -> list[str]:
    """The commands of the marked blocks of a page, in order; a continued line or a here-document is one command.

    Args:
        page: Its path below the top folder.
        in_repository: Only those marked `<!-- runnable: in the repository -->`, for people who change the code;
            otherwise all others.
    """
    found: list[str] = []
    for block in _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        if (block["note"] == IN_REPOSITORY) != in_repository:
            continue
        lines = iter(block["code"].splitlines())
        for line in lines:
            command = line
            while command.endswith("\\"):
                command = command[:-1] + next(lines)
            if heredoc := _HEREDOC.search(command):
                for line in lines:
                    command += "\n" + line
                    if line == heredoc[1]:
                        break
            if command.strip():
                found.append(command)
    return found


def run_command(command: str) -> list[str]:
    """Runs one in the current folder, `tuna-peft` in this process and what it trains for two steps.

    Returns:
        Its words.
    """
    from tuna_peft.cli.app import app

    if not command.startswith("tuna-peft "):
        subprocess.run(["bash", "-euc", command], check=True)
        return command.split()
    words = shlex.split(command, comments=True)
    cut = cuts(words[2]) if words[1] == "run" and "--dry-run" not in words else []
    result = CliRunner().invoke(app, [*words[1:], *cut])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return words


def cuts(recipe: str) -> list[str]:
    """Overrides for what a test cannot wait for: long training, sampling and evaluation."""
    from tuna_peft.recipe.load import load_recipe

    loaded, overrides = load_recipe(recipe, check=False), []
    for stage in loaded.stages:
        prompts = "data.prompts" if hasattr(stage.data, "prompts") else "data"
        overrides += [f"stages.{stage.name}.{key}" for key in ("train.max_steps=2", 'train.save_strategy="no"')]
        overrides.append(f"stages.{stage.name}.{prompts}.limit=24")
        if getattr(stage.data, "sample", None):
            overrides.append(f"stages.{stage.name}.data.sample.max_new_tokens=8")
    for name, task in (loaded.named_evaluation.tasks.given() if loaded.named_evaluation else {}).items():
        overrides.append(f"evaluation.tasks.{name}.limit=4")
        if hasattr(task, "max_new_tokens"):
            overrides.append(f"evaluation.tasks.{name}.max_new_tokens=8")
    return overrides
