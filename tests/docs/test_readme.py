"""The commands and the code of README.md run as they stand there, on the built-in model."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

README = Path(__file__).parents[2] / "README.md"
SECTION = "## Your own data and model"
# What a test cannot wait for: long training and evaluation.
SHORT = [
    *(f"stages.{name}.train.{key}" for name in ("sft", "probabilistic", "contextual")
      for key in ("max_steps=2", "save_strategy=\"no\"")),
    "evaluation.tasks.ranking.limit=4",
    "evaluation.tasks.graded.limit=4",
    "stages.contextual.data.prompts.limit=12",
]  # fmt: skip


def blocks(language):
    """Fenced blocks of a language in the section on one's own data."""
    section = README.read_text(encoding="utf-8").split(SECTION)[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def commands():
    [block] = blocks("sh")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_every_command_runs_in_order(tmp_path, monkeypatch):
    from tuna_peft.cli.app import app

    monkeypatch.chdir(tmp_path)
    seen = set()
    for program, *arguments in commands():
        assert program == "tuna-peft"
        if arguments[0] == "run" and "--dry-run" not in arguments:
            arguments += SHORT
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}"
        seen.add(arguments[0])
    assert {"doctor", "recipes", "data", "run", "generate", "merge"} <= seen
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_python_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python")
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["trainer"].state.global_step == 5
