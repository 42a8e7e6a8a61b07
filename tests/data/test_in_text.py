"""Lists and messages that a table holds as text: as JSON, as Python prints them, and as numpy does."""

import json

import pandas
import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_ranked, load_sft
from tuna_peft.errors import UserError

CHAT = PromptConfig(template="chat")
USER = {"role": "user", "content": 'Say "it\'s"\n[{]}\n {'}
ANSWER = {"role": "assistant", "content": "It's."}
OTHER = {"role": "assistant", "content": "It."}
PAIRS = {
    "prompt beside them": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "whole dialogues": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
}


def as_numpy(messages):
    return "[" + "\n ".join(map(str, messages)) + "]"


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("write", [json.dumps, str, as_numpy], ids=["JSON", "Python", "numpy"])
def test_messages_in_cells(tmp_path, name, write):
    path = tmp_path / "pairs.csv"
    pandas.DataFrame([{key: write(value) for key, value in PAIRS[name].items()}]).to_csv(path, index=False)
    [row] = load_ranked(DataSource(path=str(path)), CHAT)[0]
    assert (row["prompt"], row["completions"]) == ([USER], ["It's.", "It."])


def test_a_dialogue_in_a_cell_tells_its_format(jsonl):
    [row] = load_sft(DataSource(path=jsonl({"messages": json.dumps([USER, ANSWER])})), CHAT)[0]
    assert row["completion"] == [ANSWER]


@pytest.mark.parametrize("write", [json.dumps, str])
def test_lists_of_the_ranked_type_in_cells(tmp_path, write):
    path = tmp_path / "ranked.csv"
    record = {"prompt": "q", "completions": write(["x", "y"]), "scores": write(["1", 2.5])}
    pandas.DataFrame([record]).to_csv(path, index=False)
    [row] = load_ranked(DataSource(path=str(path)), CHAT)[0]
    assert (row["completions"], row["scores"]) == (["y", "x"], [2.5, 1.0])


@pytest.mark.parametrize("key", ["prompt", "chosen"])
def test_messages_that_were_cut_are_not_taken_for_text(jsonl, key):
    record = {"prompt": "q", "chosen": "x", "rejected": "y", key: json.dumps([USER])[:-4]}
    with pytest.raises(UserError, match=rf"line 1, `?{key}`?: a list of messages as text that cannot be read"):
        load_ranked(DataSource(path=jsonl(record)), CHAT)


def test_a_response_may_be_a_list_of_messages_in_json(jsonl):
    text = json.dumps([USER, ANSWER])
    [row] = load_sft(DataSource(path=jsonl({"instruction": "Write a chat.", "input": "", "output": text})), CHAT)[0]
    assert row["completion"][0]["content"] == text
