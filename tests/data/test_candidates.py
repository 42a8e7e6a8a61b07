"""Prompts and responses that nobody has ranked yet."""

import json

import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_candidates, load_prompts
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="none")


@pytest.fixture
def source(tmp_path):
    def write(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataSource(path=str(path), **options)

    return write


def test_samples_keep_their_order_and_the_record_of_their_prompt(source):
    origin = {"instruction": "x", "answer": 3}
    row = {"id": "a", "prompt": "p", "completions": ["b", "a", "b"], "reference": "r", "record": origin}
    [read], report = load_candidates(source(row), PLAIN)
    assert read == {"id": "a", "prompt": "p", "completions": ["b", "a"], "reference": "r", "record": origin}
    assert report.duplicates_merged == 1


def test_other_formats_give_their_responses_without_their_ranks(source):
    judged = {"instruct": "p", "generation": ["a", "b"], "rank": [1, 0], "id": 1}
    [read], _ = load_candidates(source(judged), PLAIN)
    assert read["completions"] == ["a", "b"] and read["record"] == judged
    mapped = {"q": "p", "answers": [{"text": "a"}, {"text": "b"}]}
    columns = {"prompt": "q", "completions": "answers[].text"}
    [read], _ = load_candidates(source(mapped, columns=columns), PLAIN)
    assert read["completions"] == ["a", "b"] and read["reference"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completions": []}, "no responses"),
        ({"prompt": "p"}, "no responses"),
        ({"prompt": "p", "completions": ["a", " "]}, "candidate 1: the response is empty"),
        ({"prompt": "p", "completions": ["a", 3]}, "candidate 1: the response is a number"),
    ],
)
def test_records_without_usable_responses(source, row, message):
    with pytest.raises(UserError, match=message):
        load_candidates(source(row), PLAIN)


def test_prompts_come_with_their_reference(source):
    alpaca = [{"instruction": "x", "input": "", "output": "yes"}, {"instruction": "y", "output": " "}]
    prompts, _ = load_prompts(source(*alpaca, format="alpaca"), PLAIN)
    assert [prompt["reference"] for prompt in prompts] == ["yes", None]
    prompts, _ = load_prompts(source({"prompt": "p", "reference": "r"}), PLAIN)
    assert prompts[0]["reference"] == "r"
    prompts, _ = load_prompts(source({"prompt": "p"}), PLAIN)
    assert prompts[0]["reference"] is None
