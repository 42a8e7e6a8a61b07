"""Every command that README, docs, recipes, notebooks and messages show is one that the command line takes."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import typer

from tuna_peft.cli.app import app
from tuna_peft.cli.group import PANELS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINE = re.compile(r"^\s*(?:accelerate launch .* -m tuna_peft|tuna-peft) (.*)", re.MULTILINE)


def source(path):
    """A page, a recipe's head or a notebook as lines of text in which commands stand as in a shell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        text = "\n".join(re.findall(r"^# ?(.*)", text, re.MULTILINE))
    elif path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(re.sub(r"^\s*[!%]", "", cell.source, flags=re.MULTILINE) for cell in cells)
        text = re.sub(r"\{[A-Z_]+\}", "1", text.replace("{overrides}", "a.b=1"))
    return text.replace("\\\n", " ")


def shown(path):
    """Whole commands: lines of their own in blocks, fenced for a shell or indented."""
    blocks = []

    def take(match):
        blocks.append(match[2] if match[1] in ("sh", "bash") else "")
        return ""

    rest = _FENCE.sub(take, source(path))
    indented = rest if path.suffix == ".ipynb" else "\n".join(re.findall(r"^(?: {4}|  )(\S.*)", rest, re.MULTILINE))
    return [line for text in (*blocks, indented) for line in _LINE.findall(text)]


def mentioned(path):
    """Commands in running text."""
    prose = _FENCE.sub("", source(path))
    return [" ".join(text.split()) for text in re.findall(r"`tuna-peft ([^`]*)`", prose) if "|" not in text]


def check_options(line):
    """Of a command in running text, often only its name: that it exists, and its options do."""
    command, rest = command_of(shlex.split(line.replace("…", "X")))
    parameters = command.get_params(typer.Context(command))
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= options | {"--help"}, line


def command_of(words):
    """The command that `words` begin with, and the words behind it."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def test_there_are_some():
    assert sum(len(shown(path)) for path in (*PAGES, *RECIPES, *NOTEBOOKS)) > 90
    assert all(shown(path) for path in RECIPES)


@pytest.mark.parametrize("path", [*PAGES, *RECIPES, *NOTEBOOKS], ids=lambda path: path.name)
def test_commands(path):
    for line in shown(path):
        command, rest = command_of(shlex.split(line, comments=True))
        parameters = command.make_context(command.name, rest).params  # raises for whatever it does not know
        for override in parameters.get("overrides") or ():
            assert re.match(r"[\w.]+=", override), line
    for line in mentioned(path):
        check_options(line)


def test_commands_that_messages_name():
    lines = {line for file in (ROOT / "tuna_peft").rglob("*.py") for line in mentioned(file)}
    assert len(lines) > 20
    for line in lines:
        check_options(line)


def test_every_command_stands_under_a_heading_and_ends_with_an_example():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.rich_help_panel in PANELS
        program, line = command.epilog.split("tuna-peft ")
        found, rest = command_of(shlex.split(line))
        assert program == "Example: " and line.split()[0] == name
        found.make_context(found.name, rest)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_benchmarks_and_targets(path):
    """`python -m benchmarks.NAME --option`, `make TARGET`, and extras."""
    text = source(path)
    command = r"python3? -m (benchmarks(?:\.\w+)+)([^`#)]*?)(?:[`#)]|\s{3,}|$)"
    for module, rest in re.findall(command, text, re.MULTILINE):
        found = ROOT / module.replace(".", "/")
        files = sorted(found.glob("*.py")) if found.is_dir() else [found.with_suffix(".py")]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        for option in re.findall(r"--[\w-]+", rest):
            assert f'"{option}"' in code, f"{module} {option}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {e for names in re.findall(r"\.\[([\w,-]+)\]", text) for e in names.split(",")} <= set(extras)
