"""Responses that are tool calls are scored, judged and counted as the chat template and `message_text` write them."""

from __future__ import annotations

import json

import pytest
from honest_judge import shown
from scripted_server import chat, scripted_server
from tiny_llama import load_tiny, write_base

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_candidates
from tuna_peft.feedback.judge import judge_rows
from tuna_peft.feedback.recorded import score_recorded
from tuna_peft.feedback.settings import JudgeSettings, ScoreSettings
from tuna_peft.feedback.teacher import score_rows
from tuna_peft.journal import Journal
from tuna_peft.planning.lengths import records_workload

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] + ' ' }}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'w3 ' + m['content'] + ' ' }}"
    "{% else %}{{ 'w4 ' + m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] + ' ' + c['function']['arguments']['x'] }}{% endfor %}{{ ' ' + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)


def call(argument):
    function = {"name": "w9", "arguments": {"x": argument}}
    return [{"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]


RECORD = {
    "id": "r",
    "messages": [{"role": "user", "content": "w7"}],
    "tools": [{"type": "function", "function": {"name": "w9", "parameters": {}}}],
    "answers": [call("w5"), call("w6"), call("w5"), "w8 w8 w8"],
    "logprobs": [-1.0, -8.0, -1.0, -9.0],
    "lengths": [2, 2, 2, 3],
}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    columns = {"id": "id", "prompt": "messages", "completions": "answers"}
    read, report = load_candidates(DataSource(path=str(path), columns=columns), PromptConfig(template="chat"))
    assert report.duplicates_merged == 1
    assert [len(row["completions"]) for row in read] == [3]
    return read


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    loaded = load_tiny(write_base(tmp_path_factory.mktemp("base")))
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def names(completions):
    """The argument of each call; a text as it is."""
    return [
        one if isinstance(one, str) else one[0]["tool_calls"][0]["function"]["arguments"]["x"] for one in completions
    ]


def test_a_teacher_scores_what_the_template_writes(rows, base, tmp_path):
    texts = [{**rows[0], "completions": ["w9 w5", "w9 w6", "w8 w8 w8"]}]
    with Journal(tmp_path / "scores.jsonl") as journal:
        [record], report = score_rows(base.model, base.tokenizer, rows, ScoreSettings(model="any"), journal)
        [written], _ = score_rows(base.model, base.tokenizer, texts, ScoreSettings(model="any"), journal)
        [without], _ = score_rows(
            base.model, base.tokenizer, [{**rows[0], "tools": None}], ScoreSettings(model="any"), journal
        )
    assert (report.scored, report.responses) == (1, 3)
    # The calls have the log-probabilities of the text that the template writes for them, after the same prompt.
    assert record["scores"] == pytest.approx(written["scores"], abs=1e-5)
    assert names(record["completions"]) == [text.removeprefix("w9 ") for text in written["completions"]]
    assert without["logprobs"] != record["logprobs"]  # the tools are a part of the prompt, and of the journal's key


def test_recorded_numbers_belong_to_calls(rows):
    [record], _ = score_recorded(rows, completions="answers", logprobs="logprobs", lengths="lengths")
    assert names(record["completions"]) == ["w5", "w8 w8 w8", "w6"]
    assert record["scores"] == [-0.5, -3.0, -4.0]


def test_a_judge_reads_the_calls_as_json(rows, tmp_path):
    read: list[str] = []

    def prefers_w6(asked):
        read[:] = shown(asked)
        best = sorted(range(3), key=lambda i: [word in read[i] for word in ("w6", "w5", "w8")].index(True))
        return chat(json.dumps({"rank": best}))

    with scripted_server(prefers_w6) as http:
        settings = JudgeSettings.model_validate({"server": {"base_url": http.url, "model": "judge"}})
        [record], report = judge_rows(rows, settings, tmp_path / "judge.jsonl")
    assert names(record["completions"]) == ["w6", "w5", "w8 w8 w8"]
    assert '{"name": "w9", "arguments": {"x": "w5"}}' in read
    assert report.ranked == 1 and record["tools"] == RECORD["tools"]


def test_a_plan_counts_calls(rows, base):
    [row] = records_workload(rows, base.tokenizer).rows
    assert len(row.responses) == 3 and min(row.responses) > 1
