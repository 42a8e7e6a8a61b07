"""Against a server that is not ours: llama.cpp's, which the wheel `xllamacpp` contains."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading

import pytest
from test_serving import free_port

from tuna_peft.recipe.schema import Recipe
from tuna_peft.run import sample_server
from tuna_peft.run.pipeline import run_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp (make verify-gguf)"),
]

PROGRAM = '''#!{python}
"""llama-server, with those of its options that we print."""
import argparse, threading, xllamacpp
parser = argparse.ArgumentParser()
for names in ("-m", "--alias", "--host"):
    parser.add_argument(names)
for name, default in (("--port", None), ("-c", 0), ("-np", 1)):
    parser.add_argument(name, type=int, default=default)
given = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = given.m, {{given.alias}}
params.hostnames, params.port = [given.host], given.port
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = given.c, given.np, 1
server = xllamacpp.Server(params)
threading.Event().wait()
'''


@pytest.fixture(autouse=True)
def llama_server(tmp_path, monkeypatch):
    """`llama-server` is on the path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/llama-server").write_text(PROGRAM.format(python=sys.executable))
    (tmp_path / "bin/llama-server").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def recipe(port):
    """A stage on pico-LLaMA that samples from the server, and exports for it."""
    server = {"base_url": f"http://127.0.0.1:{port}/v1", "engine": "llama.cpp", "in_flight": 8, "wait_minutes": 5}
    prompts = {"path": "builtin:pico-llama/prompts.jsonl", "limit": 16}
    return Recipe.model_validate(
        {
            "name": "served", "base": {"model": "builtin:pico-llama", "device": "cpu"},
            "quantization": {"method": "none"}, "prompt": {"template": "chat"},
            "stages": [
                {
                    "name": name, "type": "ranking",
                    "data": {
                        "prompts": prompts, "judge": {"function": "builtin:pico"},
                        "sample": {"n": 4, "trials": 1, "max_new_tokens": 12, "server": server},
                    },
                    "train": {"max_steps": 2, "learning_rate": 1e-3, "max_length": 256},
                }
                for name in ("first", "second")
            ],
            "export": {"merge": {"enabled": True, "dtype": "float32"}, "gguf": ["f32"]},
        }
    )  # fmt: skip


def test_stages_sample_from_it_and_what_they_export_is_served(tmp_path, caplog, monkeypatch):
    """The first stage samples from the base, the second from the first; each server is started as the run says."""
    port, servers, waits = free_port(), [], sample_server.wait_for_server

    def start_then_wait(ask, expected, minutes, command, *others):
        for one in servers:
            one.kill()
            one.wait()
        servers.append(subprocess.Popen(shlex.split(command)))
        return waits(ask, expected, minutes, command, *others)

    monkeypatch.setattr(sample_server, "wait_for_server", start_then_wait)
    try:
        with caplog.at_level(logging.INFO, "tuna_peft"):
            report = run_recipe(recipe(port), tmp_path / "run")
    finally:
        for one in servers:
            one.kill()
            one.wait()
    assert len(servers) == 2
    assert caplog.text.count("4 of 4 greedy answers of the server are those of the adapters") == 2
    for name in ("first", "second"):
        lines = (tmp_path / f"run/stages/{name}/samples.journal.jsonl").read_text().splitlines()[1:]
        assert len(lines) >= 14 and {len(json.loads(line)["value"]["texts"]) for line in lines} == {4}
        assert report["data"][name]["sample"]["kept"] and report["stages"][name]["steps"] == 2

    said = serve(tmp_path / "run")
    assert "4 of 4 greedy answers are those of the unmerged adapters" in said


def serve(run):
    """What `tuna-peft serve` says until Ctrl-C, once it has compared answers."""
    command = [sys.executable, "-m", "tuna_peft", "serve", run, "--engine", "llama.cpp", "--port", str(free_port())]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(300, process.kill)
    timer.start()
    said = []
    for line in process.stderr:
        said.append(line)
        if "greedy answers" in line:
            process.send_signal(signal.SIGINT)
    timer.cancel()
    assert process.wait() == 0, "".join(said)
    return "".join(said)
