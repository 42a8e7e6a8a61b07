"""Messages in the spellings of data sets, dialogues split into prompt and responses, and transcripts in plain text."""

import pytest

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_candidates, load_prompts, load_ranked, load_sft, source_format
from tuna_peft.data.messages import clean_message
from tuna_peft.data.ranked import normalise, response_text
from tuna_peft.errors import UserError

CHAT = PromptConfig(template="chat")
USER = {"role": "user", "content": "Name a river."}


def said(text, role="assistant"):
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"from": "human", "value": "q"}, said("q", "user")),
        ({"from": "GPT", "value": "a"}, said("a")),
        ({"from": "system", "value": "s", "weight": 0}, said("s", "system")),
        ({"from": "observation", "value": "41"}, said("41", "tool")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
         said("ab", "user")),
        ({"role": "tool", "content": "41", "name": "f", "tool_call_id": "c1"},
         {**said("41", "tool"), "name": "f", "tool_call_id": "c1"}),
        ({"role": "assistant", "content": "5", "reasoning_content": "sum"}, {**said("5"), "reasoning_content": "sum"}),
        ({"role": "assistant", "content": [{"type": "reasoning", "value": "sum"}, {"type": "text", "value": "5"}]},
         {**said("5"), "reasoning_content": "sum"}),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "x?"},
                                           {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
         {**said(""), "reasoning_content": "x?",
          "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1, "y": null}}'},
         {**said(""), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
         {**said(""), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
    ],
)  # fmt: skip
def test_spellings(raw, expected):
    assert clean_message(raw, "x") == expected


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "part of type `image_url`"),
        ({"role": "user", "content": [{"type": "text"}]}, "part of type `text`"),
        ({"role": "assistant", "content": [{"type": "reasoning"}, "5"]}, "reasoning has no text"),
        ({"role": "user", "content": None}, "found null"),
        ({"content": "q"}, "without a `role`"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}, "`tool_calls` has no function name"),
        ({"from": "function_call", "value": "f(1)"}, "not JSON"),
        ("text", "a message is text"),
    ],
)
def test_messages_that_cannot_be_used(raw, what):
    with pytest.raises(BadRow, match=what):
        clean_message(raw, "x")


def pair(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected, **more}


FIRST = [said("Be brief.", "system"), USER]
LONGER = [*FIRST, said("The Aare."), said("And a lake?", "user")]


@pytest.mark.parametrize("prompt", [None, "Name a river.", FIRST, LONGER])
def test_the_common_beginning_is_the_prompt(jsonl, prompt):
    record = pair([*LONGER, said("Lake Thun.")], [*LONGER, said("No.")])
    path = jsonl(record if prompt is None else {**record, "prompt": prompt})
    [row] = load_ranked(DataSource(path=path), PromptConfig())[0]
    assert (row["prompt"], row["completions"]) == (LONGER, ["Lake Thun.", "No."])


def test_dialogues_that_part_early_are_ranked_as_a_whole():
    turns = [said("a"), said("more", "user"), said("b")]
    row = normalise({"completions": [[USER, *turns], [USER, said("c")]], "scores": [2, 1]}, "x").record
    assert (row["prompt"], row["completions"]) == ([USER], [turns, "c"])
    assert response_text(turns) == "assistant: a\n\nuser: more\n\nassistant: b"
    again = normalise(row, "x")
    assert again.record == row
    # The users' turns differ: what they answer is the last turn that both share with the assistant's next.
    other = [USER, said("a"), said("other", "user"), said("b")]
    row = normalise({"completions": [[USER, *turns], other], "scores": [2, 1]}, "x").record
    assert row["prompt"] == [USER]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (
            {"prompt": "Another.", "completions": [[USER, said("a")], [USER, said("b")]]},
            "none of their common messages",
        ),
        ({"prompt": [said("x", "user")], "completions": [[USER, said("a")], [USER, said("b")]]}, "do not begin with"),
        ({"completions": [[USER, said("a")], [said("x", "user"), said("b")]]}, "begin differently"),
        ({"prompt": [USER], "completions": [[said("a"), said("x", "user")], "b"]}, "2 messages, one is expected"),
    ],
)
def test_dialogues_that_cannot_be_split(record, what):
    with pytest.raises(BadRow, match=what):
        normalise({**record, "scores": [2, 1]}, "x")


def test_equal_tool_calls_are_merged():
    call = [{**said(""), "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    found = normalise({"prompt": [USER], "completions": [call, "a", call], "scores": [3, 2, 1]}, "x")
    assert (len(found.record["completions"]), found.merged) == (2, 1)


@pytest.mark.parametrize("key", ["conversations", "messages", "prompt"])
def test_sharegpt_pairs(jsonl, key):
    record = {key: [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
              "rejected": {"from": "gpt", "value": "b"}}  # fmt: skip
    [row] = load_ranked(DataSource(path=jsonl(record)), PromptConfig())[0]
    assert (row["prompt"], row["completions"]) == ([said("q", "user")], ["a", "b"])


def test_sharegpt_ranked(jsonl):
    record = {"prompt": [{"from": "human", "value": "q"}], "completions": [[{"from": "gpt", "value": "a"}], "b"],
              "scores": [1, 2]}  # fmt: skip
    [row] = load_ranked(DataSource(path=jsonl(record)), PromptConfig())[0]
    assert row["completions"] == ["b", "a"]


@pytest.mark.parametrize("record", [
    {"messages": [USER, said("The Aare.")]},
    {"conversations": [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "The Aare."}]},
])  # fmt: skip
def test_a_dialogue_is_supervised_data(jsonl, record):
    source = DataSource(path=jsonl(record))
    assert source_format(source)[0] == "messages"
    [row] = load_sft(source, CHAT)[0]
    assert (row["prompt"], row["completion"]) == ([USER], [said("The Aare.")])
    [prompt] = load_prompts(source, CHAT)[0]
    assert prompt["prompt"] == [USER]
    with pytest.raises(UserError, match="only one response"):
        load_ranked(source, CHAT)


def test_tools_and_calls_survive_every_column_type(jsonl):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {**said(""), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}]}
    record = {"prompt": [USER], "completions": [[call], "a"], "scores": [2, 1], "tools": tools}
    plain = {"prompt": [USER], "completions": ["b", "a"], "scores": [2, 1]}
    first, second = load_ranked(DataSource(path=jsonl(record, plain)), CHAT)[0]
    assert (first["tools"], first["completions"]) == (tools, [[call], "a"])
    assert (second["tools"], second["completions"]) == (None, ["b", "a"])
    assert load_prompts(DataSource(path=jsonl(record)), CHAT)[0][0]["tools"] == tools
    assert load_candidates(DataSource(path=jsonl(record)), CHAT)[0][0]["completions"] == [[call], "a"]


def transcript(*turns):
    return "".join(f"\n\n{name}: {text}" for name, text in turns)


ASKED = transcript(("Human", "Which tree?"), ("Assistant", "Where?"), ("Human", "Here."))


def test_transcripts_as_text(jsonl):
    source = DataSource(path=jsonl(pair(f"{ASKED}\n\nAssistant: The spruce.", f"{ASKED}\n\nAssistant: A stone.")))
    assert source_format(source)[0] == "transcript"
    [row] = load_ranked(source, PromptConfig())[0]
    assert (row["prompt"], row["completions"]) == (f"{ASKED}\n\nAssistant:", [" The spruce.", " A stone."])


def test_a_response_may_begin_with_a_marker(jsonl):
    """As 27 of 2,312 records of hh-rlhf do: a turn begins on a line of its own."""
    source = DataSource(
        path=jsonl(pair(f"{ASKED}\n\nAssistant: Human: The spruce.", f"{ASKED}\n\nAssistant: A stone."))
    )
    [row] = load_ranked(source, PromptConfig())[0]
    assert row["completions"] == [" Human: The spruce.", " A stone."]


def test_pairs_of_whole_dialogues_by_llama_factory(jsonl):
    turns = [[{**USER, "loss_weight": 0.0}, {**said(text), "loss_weight": 1.0}] for text in ("a", "b")]
    source = DataSource(path=jsonl({"chosen_messages": turns[0], "rejected_messages": turns[1]}))
    [row] = load_ranked(source, CHAT)[0]
    assert (row["prompt"], row["completions"]) == ([USER], ["a", "b"])


def test_transcripts_as_messages(jsonl):
    other = transcript(("Human", "Which tree?"), ("Assistant", "None."))
    source = DataSource(path=jsonl(pair(f"{ASKED}\n\nAssistant: The spruce.", other)))
    [row] = load_ranked(source, CHAT)[0]
    assert row["prompt"] == [said("Which tree?", "user")]
    assert row["completions"][1] == "None."
    assert [message["role"] for message in row["completions"][0]] == ["assistant", "user", "assistant"]
    with pytest.raises(UserError, match="differ before their last response"):
        load_ranked(source, PromptConfig())


def test_transcripts_with_other_markers(jsonl):
    path = jsonl(pair("### Q\nWhy?\n### A\nSo.", "### Q\nWhy?\n### A\nNo."))
    source = DataSource(path=path, format="transcript", markers={"user": "### Q", "assistant": "### A"})
    assert load_ranked(source, PromptConfig())[0][0]["completions"] == ["\nSo.", "\nNo."]
    with pytest.raises(UserError, match="no transcript that ends with a turn of the assistant"):
        load_ranked(source.model_copy(update={"markers": None}), PromptConfig())
    with pytest.raises(UserError, match="`markers` has no effect"):
        load_ranked(DataSource(path=jsonl(pair("a", "b", prompt="p")), markers={}), PromptConfig())
