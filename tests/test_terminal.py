"""What reaches the terminal: no control characters but our own, whatever data, models and servers send."""

from __future__ import annotations

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.terminal import CleanFormatter, clean, console

PACKAGE = Path(__file__).parents[1] / "tuna_peft"
HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\x9b31mc\u202ed\u2066e\rf\x08g\udc80h"
PRINTS = {"secho", "Console", "StreamHandler", "print_exc", "basicConfig"}


def is_unsafe(text: str) -> bool:
    return any(
        (ord(char) < 32 and char not in "\t\n")
        or 0x7F <= ord(char) < 0xA0
        or 0x202A <= ord(char) <= 0x202E
        or 0x2066 <= ord(char) <= 0x2069
        or 0xD800 <= ord(char) <= 0xDFFF
        for char in text
    )


def test_every_control_character_is_replaced_and_nothing_else():
    every = "".join(map(chr, range(0x3000)))
    assert len(clean(every)) == len(every)
    assert [a for a, b in zip(every, clean(every), strict=True) if a != b] == [a for a in every if is_unsafe(a)]
    assert clean("\ud800é🐟\udfff\n\t") == "\ufffdé🐟\ufffd\n\t"


def test_a_console_cleans_text_inside_of_tables_and_panels_but_keeps_its_own_colors():
    out = io.StringIO()
    table = Table(HOSTILE)
    table.add_row(HOSTILE, style="green")
    console(file=out, force_terminal=True, color_system="standard", width=60).print(Panel(table, title=HOSTILE))
    own = out.getvalue().replace("\x1b[32m", "").replace("\x1b[0m", "").replace("\x1b[1m", "")
    assert own != out.getvalue()
    assert not is_unsafe(own)


def test_markup_in_data_is_text():
    out = io.StringIO()
    console(file=out).print("[red]x[/nothing]")
    assert out.getvalue() == "[red]x[/nothing]\n"


def test_log_lines_are_cleaned():
    record = logging.LogRecord("tuna_peft", logging.INFO, "", 0, "from a server: %s", (HOSTILE,), None)
    assert not is_unsafe(CleanFormatter().format(record))


def test_nothing_prints_past_the_one_module():
    direct = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        bases = [base for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
        found = {getattr(name, "attr", getattr(name, "id", "")) for name in (*calls, *bases)} & PRINTS
        found |= {ast.unparse(call) for call in calls} & {"print", "typer.echo"}
        if found:
            direct[file.relative_to(PACKAGE).as_posix()] = found
    assert direct == {"terminal.py": {"secho", "StreamHandler", "Console"}}


@pytest.mark.parametrize("arguments", [["data", "inspect"], ["data", "convert"]])
def test_commands_clean_data_and_errors(tmp_path, arguments):
    file = tmp_path / "x.jsonl"
    text = HOSTILE.replace("\udc80", "")
    file.write_text(json.dumps({"prompt": text, "completions": [text, "b"], "scores": [2, 1]}) + "\n")
    shown = CliRunner().invoke(app, ["data", "inspect", str(file)])
    assert shown.exit_code == 0
    assert "owned" in shown.output
    assert not is_unsafe(shown.output)
    file.write_text(json.dumps({text: 1}) + "\n")
    more = [str(tmp_path / "out.jsonl")] if arguments[1] == "convert" else []
    refused = CliRunner().invoke(app, [*arguments, str(file), *more])
    assert refused.exit_code == 2
    assert "owned" in refused.output
    assert not is_unsafe(refused.output)
