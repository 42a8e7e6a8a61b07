"""`run` says what a recipe runs and sends, and asks before it sends an unusual variable."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuna_peft.cli.app import app

RECIPE = """\
name: x
base: {model: org/model}
stages:
  - name: a
    type: ranking
    data: {prompts: {path: p.jsonl}, judge: {server: {base_url: 'https://h.example/v1', model: m, api_key_env: NAME}}}
evaluation: {tasks: {graded: {path: p.jsonl, grader: 'a_module_of_mine:grade'}}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a recipe that sends the variable `name`; returns the result and whether the pipeline was called."""
    calls = []
    pipeline = types.ModuleType("pipeline")
    pipeline.run_recipe = lambda recipe, output: calls.append(output)
    monkeypatch.setitem(sys.modules, "tuna_peft.run.pipeline", pipeline)
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"]}\n')

    def invoke(name, *options):
        calls.clear()
        Path("r.yaml").write_text(RECIPE.replace("NAME", name))
        return CliRunner().invoke(app, ["run", "r.yaml", *options]), bool(calls)

    return invoke


def test_an_api_key_is_sent_after_saying_where(run):
    result, ran = run("SOME_API_KEY")
    assert ran and result.exit_code == 0, result.output
    assert "this recipe sends prompts and the variable SOME_API_KEY to https://h.example/v1" in result.stderr
    assert "this recipe runs Python code: imports the module a_module_of_mine" in result.stderr


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "API_KEY_2"])
def test_another_variable_needs_a_yes(run, name, monkeypatch):
    result, ran = run(name)
    assert not ran and result.exit_code == 2
    assert f"would send the environment variable {name} to a server" in result.stderr
    assert run(name, "--yes")[1]
    for answer, expected in ((False, False), (True, True)):
        monkeypatch.setattr("tuna_peft.cli.consent.ask", lambda what, answer=answer: answer or sys.exit(1))
        assert run(name)[1] is expected


def test_a_dry_run_lists_it_and_imports_nothing(run):
    Path("a_module_of_mine.py").write_text("raise AssertionError('imported')\n\n\ndef grade(record, response): ...\n")
    result, ran = run("HF_TOKEN", "--dry-run")
    assert result.exit_code == 0 and not ran, result.output
    assert "beyond this package\n  runs Python code: imports the module a_module_of_mine" in result.stdout
    assert "the variable HF_TOKEN to https://h.example/v1" in result.stdout
    assert "asks before it sends HF_TOKEN" in result.stdout
    assert "a_module_of_mine" not in sys.modules
