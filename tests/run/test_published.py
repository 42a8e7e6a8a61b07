"""`benchmarks fetch`, from a server on this machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.evaluation.lmentry.task import TASKS, read_lmentry
from tuna_peft.evaluation.superni import read_superni
from tuna_peft.evaluation.vicuna import read_vicuna_questions
from tuna_peft.run import published

TASK = {
    "Definition": ["Add."], "Categories": ["Math"], "Positive Examples": [{"input": "1 + 1", "output": "2"}],
    "Instances": [{"id": "task1-a", "input": "2 + 2", "output": ["4"]}],
}  # fmt: skip


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/site; `asked` counts the requests, and paths in `broken` end in the middle."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            server.asked[self.path] += 1
            if self.path in server.broken:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"half')
                return
            super().do_GET()

        def log_message(self, *args):
            pass

    site = tmp_path / "site"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    server.asked, server.broken, server.site = Counter(), set(), site
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def publish(server, name, files):
    """Puts files where the benchmark is published; returns the path of its folder on the server."""
    where = f"/{published.PUBLISHED[name].repository}/{published.PUBLISHED[name].version}"
    for path, text in files.items():
        file = Path(f"{server.site}{where}/{path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return where


def fetch(server, name, folder):
    address = f"http://127.0.0.1:{server.server_port}"
    return CliRunner().invoke(app, ["benchmarks", "fetch", name, str(folder), "--address", address])


def test_natural_instructions_are_fetched_by_their_index_and_resumed(server, tmp_path):
    split = "splits/default/test_tasks.txt"
    tasks = {f"tasks/task{i}_x.json": json.dumps(TASK) for i in (1, 2)}
    where = publish(server, "natural-instructions", {split: "task1_x\ntask2_x\n", **tasks})
    folder, second = tmp_path / "superni", f"{where}/tasks/task2_x.json"
    server.broken.add(second)
    stopped = fetch(server, "natural-instructions", folder)
    assert stopped.exit_code == 2 and "cannot be downloaded" in stopped.output and second in stopped.output
    assert sorted(file.name for file in folder.rglob("*.*")) == ["task1_x.json", "test_tasks.txt"]
    server.broken.clear()
    done = fetch(server, "natural-instructions", folder)
    assert done.exit_code == 0 and "1 files downloaded" in done.output and "Apache-2.0" in done.output, done.output
    assert max(count for path, count in server.asked.items() if path != second) == 1
    record = json.loads((folder / published.RECORD).read_text())
    assert record["sha256"]["tasks/task1_x.json"] == hashlib.sha256(json.dumps(TASK).encode()).hexdigest()
    assert record["digest"] in done.output
    assert [one["task"] for one in read_superni(folder)[0]] == ["task1_x", "task2_x"]


def test_files_that_are_not_the_published_ones_are_refused(server, tmp_path, monkeypatch):
    text = json.dumps({"question_id": 1, "text": "Why?", "category": "generic"}) + "\n"
    publish(server, "vicuna", {"fastchat/eval/table/question.jsonl": text})
    folder = tmp_path / "vicuna"
    refused = fetch(server, "vicuna", folder)
    assert refused.exit_code == 2 and "not the files that were published" in refused.output
    line = f"{hashlib.sha256(text.encode()).hexdigest()}  question.jsonl\n"
    right = dataclasses.replace(published.PUBLISHED["vicuna"], digest=hashlib.sha256(line.encode()).hexdigest())
    monkeypatch.setitem(published.PUBLISHED, "vicuna", right)
    assert "(checked)" in fetch(server, "vicuna", folder).output
    assert len(read_vicuna_questions(folder / "question.jsonl", PromptTemplate(PromptConfig(template="none")))[0]) == 1


def test_lmentry_has_a_file_for_every_task():
    assert set(published.PUBLISHED["lmentry"].files) == {f"{task}.json" for task in TASKS}


def test_mistakes(server, tmp_path):
    unknown = fetch(server, "lmentri", tmp_path / "x")
    assert unknown.exit_code == 2 and "Did you mean `lmentry`" in unknown.output
    publish(server, "natural-instructions", {"splits/default/test_tasks.txt": "<html>\n../../task1\n"})
    other = fetch(server, "natural-instructions", tmp_path / "y")
    assert other.exit_code == 2 and "no list of tasks" in other.output
    absent = fetch(server, "lmentry", tmp_path / "x")
    assert absent.exit_code == 2 and "404" in absent.output and not (tmp_path / "x").exists()
    for read in (read_superni, lambda path: read_lmentry(path, None), lambda path: read_vicuna_questions(path, None)):
        with pytest.raises(UserError, match="tuna-peft benchmarks fetch"):
            read(tmp_path / "absent")


def test_a_recipe_without_its_benchmark_names_the_command(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nbase: {model: builtin:pico-llama}\n"
        "stages: [{name: s, type: ranking, data: {path: builtin:pico-llama/teacher.json}}]\n"
        "evaluation: {tasks: {lmentry: {path: data/lmentry}}}\n"
    )
    refused = CliRunner().invoke(app, ["run", str(recipe), "--dry-run"])
    assert refused.exit_code == 2 and "`tuna-peft benchmarks fetch lmentry`" in refused.output
