"""`init`: data of many shapes become recipes that `run --dry-run` accepts."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from typer.testing import CliRunner

from tuna_peft.cli import init as module
from tuna_peft.cli.app import app
from tuna_peft.recipe.load import load_recipe

TURN = [{"role": "user", "content": "Name a color."}]
ANSWER = [{"role": "assistant", "content": "Red."}]
SHAPES = {
    "ranked": ({"prompt": "Name a color.", "completions": ["Red.", "Dog."], "scores": [2, 1]}, "rank"),
    "preference": ({"prompt": TURN, "chosen": ANSWER, "rejected": [{**ANSWER[0], "content": "Dog."}]}, "rank"),
    "ultrafeedback": (
        {
            "instruction": "Name a color.",
            "completions": [
                {"response": text, "overall_score": score, "annotations": {}}
                for text, score in (("Red.", 8), ("Dog.", 2))
            ],
        },
        "rank",
    ),
    "nested": (
        {"question": "Name a color.", "answers": [{"text": "Red.", "rating": 5}, {"text": "Dog.", "rating": 1}]},
        "rank",
    ),
    "wide": (
        {"question": "Name a color.", "answer_a": "Red.", "answer_b": "Dog.", "score_a": 5, "score_b": 1},
        "rank",
    ),
    "letters": ({"q": "Name a color.", "a": "Red.", "b": "Dog.", "sa": 5, "sb": 1}, "rank"),
    "table with a text": (
        {
            "question": "Name a color.",
            "text": "No blue.",
            "answer_a": "Red.",
            "answer_b": "Dog.",
            "score_a": 5,
            "score_b": 1,
            "model": "m",
        },
        "rank",
    ),
    "verdicts": (
        {
            "key": 1,
            "question": "2 + 2?",
            "gold": "4",
            "answers": [{"text": "4", "ok": True}, {"text": "5", "ok": False}],
        },
        "rank",
    ),
    "questions and answers": ({"id": 1, "question": "Name a color.", "answer": "Red."}, "sft"),
    "questions": ({"id": "1", "question": "Name a color."}, "sample"),
    "helpsteer2": (None, "rank"),
    "alpaca": ({"instruction": "Name a color.", "input": "", "output": "Red."}, "sft"),
    "messages": ({"messages": TURN + ANSWER}, "sft"),
    "prompts": ({"instruction": "Name a color."}, "sample"),
    "full-prompts": ({"prompt": "Name a color."}, "sample"),
}


def init(*arguments, input=None):
    return CliRunner().invoke(app, ["init", *map(str, arguments)], input=input)


def write(path, name):
    """Three records of a shape, gzipped JSONL."""
    record, goal = SHAPES[name]
    records = [record] * 3 if record else [
        {"prompt": f"Name {which}.", "response": text, "helpfulness": score, "correctness": score, "coherence": score,
         "complexity": 1, "verbosity": 1}
        for which in ("a color", "a pet", "a fruit") for text, score in (("Red dog pear.", 4), ("No.", 0))
    ]  # fmt: skip
    text = "".join(json.dumps(one) + "\n" for one in records)
    path.write_bytes(gzip.compress(text.encode()))
    return goal


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recipe_for_data_of_this_shape(shape, tmp_path):
    goal = write(tmp_path / "data.jsonl.gz", shape)
    file = tmp_path / "mine.yaml"
    made = init(file, "--data", tmp_path / "data.jsonl.gz", "--model", "builtin:pico-llama", "--template", "alpaca")
    assert made.exit_code == 0, made.output
    kinds = {"rank": ["ranking"], "sft": ["sft"], "sample": ["ranking"]}
    recipe = load_recipe(str(file))
    assert [stage.type for stage in recipe.stages] == kinds[goal]
    assert (recipe.stages[0].data.prompts if goal == "sample" else recipe.stages[0].data).path
    assert "Planned for CPU" in made.output
    checked = CliRunner().invoke(app, ["run", str(file), "--dry-run", "-o", str(tmp_path / "run")])
    assert checked.exit_code == 0, checked.output


def test_every_goal_that_ranked_data_allows(tmp_path):
    write(tmp_path / "data.jsonl.gz", "ranked")
    stages = {}
    for goal in ("rank", "sft-rank", "sft", "sample"):
        file = tmp_path / f"{goal}.yaml"
        arguments = ["--data", tmp_path / "data.jsonl.gz", "--model", "builtin:pico-llama", "--goal", goal]
        assert init(file, *arguments, "--template", "alpaca").exit_code == 0
        stages[goal] = [stage.name for stage in load_recipe(str(file)).stages]
    assert stages == {"rank": ["ranking"], "sft-rank": ["sft", "ranking"], "sft": ["sft"], "sample": ["contextual"]}


def test_a_terminal_is_asked_with_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_asks", lambda: True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl.gz", "ranked")
    answers = ["data.jsonl.gz", "builtin:pico-llama", "T4", "none", "sft"]
    made = init("mine.yaml", input="\n".join(answers) + "\n")
    assert made.exit_code == 0, made.output
    recipe = load_recipe("mine.yaml")
    assert (recipe.base.model, recipe.prompt.template, recipe.stages[0].type) == ("builtin:pico-llama", "none", "sft")
    assert "sft-rank  fine-tune on the best responses" in made.output and "Planned for T4" in made.output


def test_a_terminal_is_asked_about_columns_that_have_no_known_names(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_asks", lambda: True)
    monkeypatch.chdir(tmp_path)
    with open("frage.csv", "w", newline="") as file:
        rows = [["Frage", "Antwort 1", "Antwort 2", "Note x", "Note y"], ["Eine Farbe?", "Rot.", "Hund", "5", "1"]]
        csv.writer(file).writerows(rows + [rows[1]])
    asked = ["Frage", "", "Antwort 1, Antwort 2", "Note x, Note y", "builtin:pico-llama", "", "none", "rank"]
    made = init("mine.yaml", "--data", "frage.csv", input="\n".join(asked) + "\n")
    assert made.exit_code == 0, made.output
    assert load_recipe("mine.yaml").stages[0].source.columns.model_dump(exclude_none=True) == {
        "instruction": "Frage", "completions": ["Antwort 1", "Antwort 2"], "scores": ["Note x", "Note y"],
    }  # fmt: skip
    assert "columns: instruction = Frage" in made.output


def test_what_is_used_and_what_is_not_is_printed(tmp_path):
    write(tmp_path / "data.jsonl.gz", "table with a text")
    made = init(tmp_path / "mine.yaml", "--data", tmp_path / "data.jsonl.gz", "--model", "builtin:pico-llama")
    assert "input = text" in made.output and "not used: model" in made.output
    assert load_recipe(str(tmp_path / "mine.yaml")).stages[0].source.columns.input == "text"


def test_a_recipe_in_place_of_data_gives_its_data(tmp_path):
    write(tmp_path / "data.jsonl.gz", "ranked")
    first = ["--data", tmp_path / "data.jsonl.gz", "--model", "builtin:pico-llama"]
    assert init(tmp_path / "one.yaml", *first).exit_code == 0
    assert init(tmp_path / "new" / "two.yaml", "--data", tmp_path / "one.yaml", *first[2:]).exit_code == 0
    assert "path: ../data.jsonl.gz" in (tmp_path / "new" / "two.yaml").read_text()


def test_the_path_of_the_data_is_relative_to_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl.gz", "ranked")
    assert init("recipes/mine.yaml", "--data", "data.jsonl.gz", "--model", "builtin:pico-llama").exit_code == 0
    assert "path: ../data.jsonl.gz" in (tmp_path / "recipes" / "mine.yaml").read_text()


def test_bad_records_are_skipped_in_the_recipe_too(tmp_path):
    good, bad = SHAPES["ranked"][0], {"prompt": "Name a color.", "completions": [], "scores": []}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, bad, good)))
    made = init(tmp_path / "mine.yaml", "--data", tmp_path / "data.jsonl", "--model", "builtin:pico-llama")
    assert "3 records read, 2 kept" in made.output
    assert load_recipe(str(tmp_path / "mine.yaml")).stages[0].data.on_bad_row == "skip"


def test_errors_come_before_anything_is_written(tmp_path):
    file, data = tmp_path / "mine.yaml", tmp_path / "data.jsonl.gz"
    write(data, "alpaca")
    model = ["--model", "builtin:pico-llama"]
    for arguments, message in [
        ([file], "Give it with --data FILE"),
        ([tmp_path / "mine.txt", "--data", data], "mine.yaml"),
        ([file, "--data", tmp_path / "none.jsonl"], "none.jsonl"),
        ([file, "--data", data, *model, "--goal", "rank"], "It has what is needed for: sft, sample."),
        ([file, "--data", data, *model, "--goal", "rnk"], "Did you mean `rank`?"),
        ([file, "--data", data, *model, "--gpu", "T44"], "T44"),
    ]:
        refused = init(*arguments)
        assert refused.exit_code == 2 and message in refused.output, refused.output
        assert not file.exists()
    with open(tmp_path / "odd.csv", "w", newline="") as odd:
        csv.writer(odd).writerows([["a", "b"], ["Name a color.", "Red."]])
    refused = init(file, "--data", tmp_path / "odd.csv", *model)
    assert refused.exit_code == 2 and "which of these is the prompt" in refused.output
    file.write_text("mine")
    assert init(file, "--data", data, *model).exit_code == 2 and file.read_text() == "mine"
    assert init(file, "--data", data, *model, "--force").exit_code == 0
