"""Commands of engines, waiting for a server, and `tuna-peft serve` with programs that stand in for engines."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
from tiny_llama import write_base, write_stack
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.errors import UserError
from tuna_peft.export.merge import merge_stack
from tuna_peft.run import serve, serving
from tuna_peft.run.serving import Served, wait_for_server

SERVER = '''#!{python}
"""Answers every completion with the text in the environment."""
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {{"index": 0, "text": os.environ["ANSWER"], "finish_reason": "stop"}}
        body = json.dumps({{"choices": [choice]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.answered += 1

    def log_message(self, *args): pass

server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.answered = 0
while server.answered < 4:
    server.handle_request()
sys.exit(int(os.environ.get("EXIT", 0)))
'''


@pytest.fixture
def clock(monkeypatch):
    """Time passes only while something sleeps."""
    now = [0.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def fails():
    raise UserError("no connection")


def test_it_waits_until_the_right_model_answers(clock):
    answers = itertools.chain([["x", "y"]] * 3, [["a", "z"]])  # another model first, then half equal: rounding
    said = []
    assert wait_for_server(lambda: next(answers), ["a", "b"], 1, "start", say=said.append) == ["a", "z"]
    assert clock[0] == 3 * serving._PAUSE and len(said) == 1 and "another model" in said[0]


def test_it_says_every_30_seconds_what_it_waits_for_and_gives_up_with_the_command(clock):
    said = []
    with pytest.raises(UserError, match="after 2 minutes: no connection") as error:
        wait_for_server(fails, ["a"], 2, "vllm serve model", say=said.append)
    assert error.value.fix.endswith("vllm serve model")
    assert len(said) == 4 and said[0] == "waiting for the server: no connection"  # at 0, 30, 60 and 90 seconds


def test_commands():
    merged = Served("m", "tuna", port=9, context=64)
    assert merged.command("vllm") == [
        "vllm", "serve", "m", "--served-model-name", "tuna", "--generation-config", "vllm", "--max-model-len", "64",
        "--host", "127.0.0.1", "--port", "9",
    ]  # fmt: skip
    assert merged.command("llama.cpp")[:7] == ["llama-server", "-m", "m", "--alias", "tuna", "-c", "512"]
    assert merged.command("transformers")[-1] == "m" and "--context-length" in merged.command("sglang")
    combined = Served("base", "tuna", adapter="c", rank=32).command("vllm")
    assert "tuna=c" in combined and combined[combined.index("--max-lora-rank") + 1] == "32"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    write_stack(folder / "stack", write_base(folder / "base"))
    merge_stack(folder / "stack", folder / "merged", dtype="float32")
    return folder


def program(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(SERVER.format(python=sys.executable))
    (folder / name).chmod(0o755)


def test_print_only_prints(run, monkeypatch):
    monkeypatch.setattr(serve, "find_program", lambda engine: None)
    result = CliRunner().invoke(app, ["serve", str(run), "--print", "--port", "8123"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"vllm serve {run}/merged --served-model-name mine") and "8123" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no engine is installed that can serve this"),
        (["--engine", "vllm"], "vllm is not installed"),
        (["--engine", "llama.cpp"], "llama.cpp has nothing to serve here"),
        (["--engine", "vlm"], "did you mean `vllm`"),
    ],
)
def test_what_cannot_be_started_is_said(run, monkeypatch, options, message):
    monkeypatch.setattr(serve, "find_program", lambda engine: None)
    result = CliRunner().invoke(app, ["serve", str(run), *options])
    assert result.exit_code == 2 and message.lower() in result.stderr.lower()
    if not options:
        assert "nstall" in result.stderr


def test_a_folder_without_exports(tmp_path):
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2 and "tuna-peft merge" in result.stderr


@pytest.mark.parametrize(("code", "exit"), [("0", 0), ("3", 2)])
def test_it_compares_answers_with_the_stack(run, tmp_path, monkeypatch, code, exit):
    program(tmp_path / "bin", "vllm")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    _, expected = serve.expected_answers(run, "cpu")
    monkeypatch.setenv("ANSWER", max(set(expected), key=expected.count))
    monkeypatch.setenv("EXIT", code)
    equal = expected.count(os.environ["ANSWER"])
    result = CliRunner().invoke(app, ["serve", str(run), "--engine", "vllm", "--port", str(free_port())])
    assert result.exit_code == exit, result.stderr
    assert f"{equal} of 4 greedy answers are those of the unmerged adapters" in result.stderr
    assert ("exit code 3" in result.stderr) == (exit == 2)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_least_rounded_file_is_served(tmp_path):
    for name, size in (("m-Q4_0.gguf", 1), ("m-F16.gguf", 9), ("m-LORA-F32.gguf", 99)):
        (tmp_path / name).write_bytes(b"x" * size)
    found = serve.find_exports(tmp_path, None, "127.0.0.1", 1)
    assert list(found) == ["llama.cpp"] and found["llama.cpp"].model.endswith("m-F16.gguf")
    one = serve.find_exports(tmp_path / "m-Q4_0.gguf", None, "127.0.0.1", 1)["llama.cpp"]
    assert one.model.endswith("m-Q4_0.gguf") and one.name == "m-Q4_0"
