"""Every command that reads data reads a table as a recipe or a run does, by the same options."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from spies import spy
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.load import load_recipe

TABLE = """\
Frage;Antwort eins;Antwort zwei;Note 1;Note 2
Nenne eine Farbe.;Hund;Rot.;1;5
Nenne einen Tag.;Montag.;Tag;4;2
"""
COLUMNS = {"instruction": "Frage", "completions": ["Antwort eins", "Antwort zwei"], "scores": ["Note 1", "Note 2"]}
RECIPE = f"""\
name: r
base: {{model: "builtin:pico-llama"}}
prompt: {{template: "{{instruction}} ->"}}
stages:
  - name: sft
    type: sft
    data: {{path: alpaca.jsonl, limit: 1}}
  - name: rank
    type: ranking
    data: {{path: odd.csv, on_bad_row: skip, columns: {json.dumps(COLUMNS)}}}
"""
BY_HAND = ("--column", "instruction=Frage", "--column", "completions=Antwort eins,Antwort zwei",
           "--column", "scores=Note 1,Note 2", "--skip-bad-rows")  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory with two equal tables, a recipe for one of them, and the folder of its run."""
    monkeypatch.chdir(tmp_path)
    for name in ("odd.csv", "new.csv"):
        Path(name).write_text(TABLE)
    Path("alpaca.jsonl").write_text(json.dumps({"instruction": "i", "input": "", "output": "o"}) + "\n")
    Path("r.yaml").write_text(RECIPE)
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(dump_recipe(load_recipe("r.yaml")))
    Path("run/run.json").write_text("{}")


def tuna(*arguments):
    return CliRunner().invoke(app, [*arguments])


COMMANDS = {
    "convert": ("data.convert:convert", "data", "convert", "{}", "o.jsonl"),
    "inspect": ("data.inspect:inspect_file", "data", "inspect", "{}"),
    "judge": ("data.load:load_candidates", "judge", "{}", "o.jsonl", "--function", "builtin:pico"),
    "score": ("data.load:load_candidates", "score", "{}", "o.jsonl", "--model", "m"),
    "sample": ("data.load:load_prompts", "sample", "builtin:pico-llama", "{}", "o.jsonl", "--template", "alpaca"),
}


def read_by(monkeypatch, command, data, *options):
    """The source and the prompt template that a command reads."""
    target, *arguments = COMMANDS[command]
    module, _, function = target.partition(":")
    with monkeypatch.context() as patched:
        calls = spy(patched, importlib.import_module(f"tuna_peft.{module}"), function)
        result = tuna(*(one.format(data) for one in arguments), *options)
    assert "error: Seen" in result.output, result.output
    [((source, prompt, *_), _)] = calls
    return source, prompt


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_is_read_alike_by_columns_by_recipe_and_by_run(folder, monkeypatch, command):
    by_hand, _ = read_by(monkeypatch, command, "new.csv", *BY_HAND)
    assert by_hand.columns.model_dump(exclude_none=True) == COLUMNS
    for recipe in ("r.yaml", "r.yaml@rank", "run", "run@rank"):
        source, prompt = read_by(monkeypatch, command, "new.csv", "--recipe", recipe)
        assert source == by_hand
        if command != "sample":
            assert prompt.template == "{instruction} ->"
    other, prompt = read_by(monkeypatch, command, "new.csv", "--recipe", "run", "--split", "train[:1]",
                            "--column", "instruction=Note 1")  # fmt: skip
    assert (other.split, other.columns.instruction, other.columns.completions) == ("train[:1]", "Note 1", None)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "inspect"])
def test_a_recipe_in_place_of_data_is_its_data(folder, monkeypatch, command):
    source, prompt = read_by(monkeypatch, command, "run@rank")
    assert source == load_recipe("r.yaml").stages[1].source
    assert read_by(monkeypatch, command, "r.yaml@sft")[0].limit == 1
    assert read_by(monkeypatch, command, "r.yaml@rank", "--split", "train[1:]")[0].split == "train[1:]"


def test_convert_gives_equal_files(folder):
    for out, arguments in {"a": ["run@rank"], "b": ["new.csv", "--recipe", "r.yaml"]}.items():
        assert tuna("data", "convert", *arguments[:1], f"{out}.jsonl", *arguments[1:]).exit_code == 0
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert (rows[0]["prompt"], rows[0]["completions"]) == ("Nenne eine Farbe. ->", ["Rot.", "Hund"])
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()


def test_inspect_shows_the_data_of_a_run(folder):
    shown = tuna("data", "inspect", "run@rank")
    assert shown.exit_code == 0, shown.output
    assert "stage rank" in shown.output and "stage sft" not in shown.output and "Montag." in shown.output


def evaluated(monkeypatch, *arguments):
    """The settings of the tasks that `evaluate` measures."""
    with monkeypatch.context() as patched:
        calls = spy(patched, importlib.import_module("tuna_peft.run.evaluate"), "evaluate_target")
        result = tuna("evaluate", *arguments)
    assert "error: Seen" in result.output, result.output
    return calls[0][0][1].tasks


def test_evaluate_reads_a_table_as_its_run_does_where_that_suits(folder, monkeypatch):
    ranking = evaluated(monkeypatch, "run", "--task", "ranking=new.csv").ranking
    assert ranking.columns.model_dump(exclude_none=True) == COLUMNS and ranking.on_bad_row == "skip"
    assert evaluated(monkeypatch, "m", "-t", "ranking=new.csv", "--recipe", "r.yaml@rank").ranking == ranking
    assert evaluated(monkeypatch, "m", "-t", "ranking=new.csv", *BY_HAND).ranking == ranking
    Path("ranked.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]}) + "\n")
    other = evaluated(monkeypatch, "run", "--task", "ranking=ranked.jsonl", "tasks.ranking.margin=0.5").ranking
    assert (other.columns, other.format, other.margin) == (None, "auto", 0.5)


def test_pico_is_evaluated_on_a_table(folder):
    measured = tuna("evaluate", "builtin:pico-llama", "-t", "ranking=new.csv", "--recipe", "r.yaml", "-o", "results")
    assert measured.exit_code == 0, measured.output
    assert json.loads(Path("results/evaluation/model/ranking.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "convert", "r.yaml", "o.jsonl"], "r.yaml@sft"),
        (["data", "convert", "r.yaml@sfft", "o.jsonl"], "Did you mean `sft`?"),
        (["data", "convert", "new.csv", "o.jsonl", "--recipe", "odd.csv"], "neither a recipe nor the folder of a run"),
        (["data", "convert", "absent.yaml", "o.jsonl"], "there is no such recipe file"),
        (["data", "inspect", "r.yaml", "--split", "x"], "no effect on a recipe"),
        (["data", "inspect", "new.csv", "--column", "instrution=Frage"], "Did you mean `instruction`?"),
        (["evaluate", "run", "--column", "instruction=Frage"], "--task ranking=held-out.csv"),
        (["evaluate", "run", "--task", "superni=x", "--recipe", "r.yaml"], "no effect without data"),
    ],
)
def test_mistakes(folder, arguments, message):
    result = tuna(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not Path("o.jsonl").exists()
