"""`data inspect` and `data convert`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tuna_peft.cli.app import app

RECIPE = """\
name: x
base: {model: org/model}
prompt: {template: none}
stages:
  - {name: one, type: ranking, data: {path: data.jsonl}}
  - {name: two, type: ranking, data: {path: data.jsonl, limit: 1}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with ranked data, nested data and a recipe."""
    ranked = [{"prompt": f"question {i}", "completions": ["fine", "poor"], "scores": [2.0, 1.0]} for i in range(4)]
    nested = [
        {"q": f"question {i}", "answers": [{"text": "fine", "s": 2}, {"text": "poor", "s": 1}]} for i in range(4)
    ]
    nested.append({"q": "question 4", "answers": [{"text": "alone", "s": 1}]})
    for name, rows in (("data", ranked), ("nested", nested)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["data", *arguments])


COLUMNS = ["--column", "prompt=q", "--column", "completions=answers[].text", "--column", "scores=answers[].s"]


def test_inspect_a_file(folder):
    result = invoke("inspect", "data.jsonl", "--n", "1")
    assert result.exit_code == 0
    assert "4 records read" in result.stdout
    assert "question 0" in result.stdout and "question 1" not in result.stdout
    assert result.stdout.index("fine") < result.stdout.index("poor")


def test_inspect_a_recipe_shows_its_stages_with_its_tokenizer(folder, monkeypatch):
    loaded = []
    monkeypatch.setattr("tuna_peft.cli.data.load_tokenizer", lambda *given: loaded.append(given[0]))
    result = invoke("inspect", "r.yaml")
    assert result.exit_code == 0
    assert "stage one (ranking)" in result.stdout and "stage two (ranking)" in result.stdout
    assert loaded == ["org/model"]
    assert "stage one" not in invoke("inspect", "r.yaml", "--stage", "two").stdout


def test_convert_with_columns(folder):
    result = invoke("convert", "nested.jsonl", "out.jsonl", *COLUMNS, "--skip-bad-rows")
    assert result.exit_code == 0
    assert "wrote out.jsonl: 4 of 5 records\n  1 of 5 records are skipped: one response (20.0%)" in result.stdout
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == "question 0"
    assert rows[0]["completions"] == ["fine", "poor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "data.jsonl", "--format", "rankd"], "format: expected 'auto', 'ranked'"),
        (["inspect", "data.jsonl", "--stage", "one"], "--stage needs a recipe"),
        (["inspect", "r.yaml", "--stage", "three"], "the recipe has no stage `three`"),
        (["inspect", "absent.jsonl"], "there is no such file"),
        (["inspect", "data.jsonl", "--tokenizer", "./absent"], "cannot load a tokenizer"),
        (["convert", "nested.jsonl", "out.jsonl", *COLUMNS], "nested.jsonl: line 5"),
        (["convert", "nested.jsonl", "out.jsonl", "--column", "prompt"], "expected part=path"),
        (["convert", "nested.jsonl", "out.csv", *COLUMNS], "cannot write .csv"),
    ],
)
def test_mistakes_exit_with_2_and_write_nothing(folder, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (folder / "out.jsonl").exists()
