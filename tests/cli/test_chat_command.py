"""`tuna-peft chat` from a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
from tiny_llama import write_base, write_stack
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.cli.chat import Chat, side_by_side
from tuna_peft.models.generation.conversation import Reply
from tuna_peft.terminal import console


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_stack(folder / "stack", write_base(folder / "base"))
    return folder


def chat(run, text, *options):
    arguments = ["chat", str(run), "--max-new-tokens", "4", "--template", "{instruction} ", *options]
    return CliRunner().invoke(app, arguments, input=text)


def test_piped_lines_are_answered_and_obeyed(run, tmp_path):
    file = tmp_path / "talk.jsonl"
    typed = ["w3 w4", "/stage base", "", "w3 w4", "/compare", "/compare w5", "/temperature 0.7", "w6",
             f"/save {file}", f"/save {file}", "/reset", "/compare", "/help", "/sage x", "/stage absent",
             "/temperature hot", "/save x.txt", "/quit", "/after the end"]  # fmt: skip
    result = chat(run, "\n".join(typed) + "\n", "--stage", "sft")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Stages: base, sft, ranking", "/help lists the commands, Ctrl-D ends the chat."]
    assert "sft> w3 w4" in lines and "base> w3 w4" in lines
    alone = CliRunner().invoke(
        app, ["generate", str(run), "w3 w4", "--upto", "sft", "--template", "{instruction} ", "--max-new-tokens", "4"]
    )
    assert lines[lines.index("sft> w3 w4") + 1] == alone.stdout.strip()
    assert "\r" not in result.stdout and all(len(line) <= 80 for line in lines if str(file) not in line)
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["w3 w4", "w3 w4", "w6"]
    for wrong in ("there is such a file", "no question was asked", "no command /sage", "no stage 'absent'",
                  "temperature", ".jsonl"):  # fmt: skip
        assert wrong in result.stderr, wrong
    assert result.stderr.count("error: ") == 6


def test_a_wrong_stage_is_a_mistake(run):
    assert chat(run, "", "--stage", "absent").exit_code == 2
    assert chat(run, "", "--temperature", "-1").exit_code == 2


def test_answers_stand_side_by_side_where_there_is_room():
    replies = {name: Reply(f"{name} " * 20, stopped=name == "c") for name in "abc"}

    def shown(names, width):
        out = io.StringIO()
        console(file=out, width=width).print(side_by_side({name: replies[name] for name in names}, width))
        return out.getvalue().splitlines()

    wide = shown("abc", 80)
    assert max(map(len, wide)) == 80 and "a a" in wide[3] and "c c" in wide[3]
    assert "[stopped]" in " ".join(wide)
    narrow = shown("abc", 50)
    assert max(map(len, narrow)) <= 50 and not any("a a" in line and "b b" in line for line in narrow)


def test_what_a_model_says_cannot_order_the_terminal_about(capsys):
    def ask(question, show, **options):
        show("a\x1b[2Jb")
        return Reply("a\x1b[2Jb", stopped=False)

    Chat(SimpleNamespace(ask=ask, forgotten=0), {}).take("hello")
    assert capsys.readouterr().out == "a\ufffd[2Jb\n"


def test_on_a_terminal_ctrl_c_says_how_to_leave_and_ctrl_d_leaves(run):
    """Through a pseudo terminal, as a user would."""
    outside, inside = pty.openpty()
    command = [sys.executable, "-m", "tuna_peft", "chat", str(run), "--template", "{instruction} ",
               "--max-new-tokens", "100000"]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest runs in the background
    )  # fmt: skip
    os.close(inside)
    seen = ""

    def wait_for(text, meanwhile=lambda: None):
        nonlocal seen
        end = time.monotonic() + 240
        while text not in seen:
            assert time.monotonic() < end and process.poll() is None, seen
            if select.select([outside], [], [], 1)[0]:
                seen += os.read(outside, 4096).decode(errors="replace")
            else:
                meanwhile()
        seen = seen.partition(text)[2]

    try:
        wait_for("ranking> ")
        # A signal between the prompt and the wait for input is noticed at the next input only, so it is repeated.
        interrupt = partial(process.send_signal, signal.SIGINT)
        interrupt()
        wait_for("Ctrl-D ends the chat.", interrupt)
        wait_for("ranking> ")
        os.write(outside, b"w3 w4\n")
        wait_for("w3 w4")
        wait_for("ranking> ")
        os.write(outside, b"\x04")
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
        process.wait()
        os.close(outside)
