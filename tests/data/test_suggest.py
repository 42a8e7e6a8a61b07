"""`data inspect` and errors end with the `data:` block that reads the file, or say which decision is missing."""

import csv

import pytest
import yaml
from rich.console import Console

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.inspect import inspect_file
from tuna_peft.data.load import read_ranked
from tuna_peft.data.suggest import data_block, suggest, unused
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="{instruction}")

RECORDS = {
    "objects": {"id": 7, "question": "q", "answers": [{"text": "y", "score": 1}, {"text": "x", "score": 2}]},
    "ranks": {"query": "q", "outputs": [{"output": "y", "rank": 2}, {"output": "x", "rank": 1}], "n": 2},
    "lists": {"prompt": "q", "responses": ["y", "x"], "rewards": [0.1, 0.2], "models": ["m", "n"]},
    "columns": {"question": "q", "answer_a": "y", "answer_b": "x", "score_a": 1, "score_b": 2},
    "numbers": {"instruction": "q", "input": "", "response1": "y", "response2": "x", "rating1": 1, "rating2": 5},
    "winner": {"prompt": "q", "response_a": "y", "response_b": "x", "winner": "model_b"},
    "letters": {"q": "q", "a": "y", "b": "x", "sa": 1, "sb": 2},
    "text": {"text": "q", "model": "m", "answer_a": "y", "answer_b": "x", "score_a": 1, "score_b": 2},
    "verdicts": {"question": "q", "answers": [{"text": "y", "ok": False}, {"text": "x", "ok": True}]},
}


@pytest.mark.parametrize(
    ("name", "table"),
    [(name, False) for name in RECORDS]
    + [(name, True) for name in ("columns", "numbers", "winner", "letters", "text")],
)
def test_the_suggested_block_reads_the_file(jsonl, tmp_path, name, table):
    record, path = RECORDS[name], str(tmp_path / "data.csv")
    if not table:
        path = jsonl(record)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([record.keys(), record.values()])
    with pytest.raises(UserError) as caught:
        read_ranked(DataSource(path=path), PLAIN)
    assert "Perhaps this reads it" in caught.value.fix
    block = caught.value.fix[caught.value.fix.index("data:") : caught.value.fix.index("After a command")]
    source = DataSource.model_validate(yaml.safe_load(block)["data"])
    [read], _ = read_ranked(source, PLAIN)
    assert (read["prompt"], read["completions"]) == ("q", ["x", "y"])


def test_one_response_a_row_is_grouped():
    settings, missing = suggest({"prompt": "q", "response": "x", "rating": "4"})
    assert settings == {
        "columns": {"instruction": "prompt", "completions": "response", "scores": "rating"}, "group_by": "prompt"
    }  # fmt: skip
    assert not missing


@pytest.mark.parametrize("name", ["text", "context", "Input", "passage"])
def test_a_text_beside_the_question_is_its_input(name):
    settings, missing = suggest({"question": "q", name: None, "answer": "x", "score": "4", "gold": "g", "model": "m"})
    assert settings["columns"] == {
        "instruction": "question", "completions": "answer", "scores": "score", "input": name, "reference": "gold"
    }  # fmt: skip
    assert not missing


def test_a_text_alone_is_the_response():
    assert suggest({"question": "q", "text": "x", "score": 1})[0]["columns"]["completions"] == "text"
    assert "instruction" not in suggest({"text": "x", "score": 1})[0]["columns"]


def test_missing_decisions_are_named(jsonl):
    path = jsonl({"frage": "q", "antwort": ["x", "y"]})
    with pytest.raises(UserError) as caught:
        read_ranked(DataSource(path=path), PLAIN)
    fix = caught.value.fix
    assert "which of these is the prompt" in fix and "which of these are the responses" in fix
    assert "(`frage`, `antwort`)" in fix


@pytest.mark.parametrize(
    ("record", "options", "expected"),
    [
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, {}, {"format": "preference"}),
        (
            {"prompt": "p", "all_responses": ["x", "y"], "overall_scores": [1, 0]},
            {"split": "train[:1]"},
            {
                "format": "columns",
                "split": "train[:1]",
                "columns": {"instruction": "prompt", "completions": "all_responses", "scores": "overall_scores"},
            },
        ),
    ],
)
def test_inspect_ends_with_the_block(jsonl, record, options, expected):
    source = DataSource(path=jsonl(record), **options)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspect_file(source, PLAIN))
    block = capture.get().partition("In a recipe:")[2]
    assert yaml.safe_load(block)["data"] == {"path": source.path, **expected}


def test_keys_are_used_by_paths_that_begin_with_them():
    """`a` is no beginning of `ab`; a key may hold a point itself, and be reached through another."""
    columns = {"instruction": "q.text", "completions": ["ab", "list[].text"], "scores": "list[].score.of"}
    record = dict.fromkeys(["q", "q.text", "q.te", "a", "ab", "list", "list[]", "list[].score", "text", "b.q"])
    assert unused(record, columns) == ["q.te", "a", "text", "b.q"]


def test_defaults_are_not_written():
    assert data_block(DataSource(path="a.jsonl")) == "data: {path: a.jsonl}"
