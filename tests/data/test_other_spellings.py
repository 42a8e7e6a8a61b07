"""The same things in other spellings: labels, delimiters, system messages, several chosen, missing values, prompts."""

import json

import pytest
import yaml

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.grouping import winner_index
from tuna_peft.data.load import load_candidates, load_prompts, read_ranked, source_format
from tuna_peft.data.messages import message_text
from tuna_peft.data.suggest import suggest
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="{instruction}")
CHAT = PromptConfig(template="chat")
USER = {"role": "user", "content": "Q?"}


def said(text):
    return [{"role": "assistant", "content": text}]


def read(source, prompt=PLAIN):
    records, report = read_ranked(source, prompt)
    return [(record["completions"], record["ranks"]) for record in records], report


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("[[B]]", 1), ("A>B", 0), ("B >> A", 1), ("a<b", 1), ("A=B", None), ("Model B wins", 1), ("a is better", 0),
        ("both_bad", None), ("bothbad", None), ("tie (bothbad)", None), ("No preference", None), ("=", None),
        ("ties", None),
    ],
)  # fmt: skip
def test_labels(label, expected):
    assert winner_index(label, ["x", "y"], None, "here") == expected


@pytest.mark.parametrize("label", ["better", "equals", "bothers", "C", "", True])
def test_labels_that_say_nothing_are_quoted_in_the_line_to_write(label):
    with pytest.raises(UserError) as caught:
        winner_index(label, ["x", "y"], None, "here")
    assert f"winner_labels: {{{label}" in caught.value.fix


def test_truth_values_are_labels_if_the_recipe_says_so(jsonl):
    labels = yaml.safe_load("{true: 0, false: 1}")
    columns = {"instruction": "q", "completions": ["a", "b"], "winner": "w", "winner_labels": labels}
    rows = [{"q": "Q?", "a": "x", "b": "y", "w": word} for word in (True, False, "TRUE", "false")]
    found, _ = read(DataSource(path=jsonl(*rows), columns=columns))
    assert [completions[0] for completions, _ in found] == ["x", "y", "x", "y"]


def test_who_did_not_vote_does_not_count(jsonl):
    columns = {"instruction": "q", "completions": ["a", "b"], "winner": ["v1", "v2"]}
    rows = [
        {"q": "Q?", "a": "x", "b": "y", "v1": None, "v2": "B"},
        {"q": "R?", "a": "x", "b": "y", "v1": None, "v2": None},
    ]
    found, report = read(DataSource(path=jsonl(*rows), columns=columns, on_bad_row="skip"))
    assert found == [(["y", "x"], [0, 1])] and report.skipped == {"no label": 1}


@pytest.mark.parametrize(
    "content",
    ["q|a|b\nQ, or; what?|yes|no\n", "sep=|\nq|a|b\nQ, or; what?|yes|no\n", "sep=:\nq:a:b\nQ, or; what?:yes:no\n"],
)
def test_delimiters(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_text(content)
    columns = {"instruction": "q", "completions": ["a", "b"], "ranks": "best_first"}
    [record], _ = read_ranked(DataSource(path=str(path), columns=columns), PLAIN)
    assert (record["prompt"], record["completions"]) == ("Q, or; what?", ["yes", "no"])
    assert record["id"] == f"line-{content.count(chr(10))}"


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "conversations": [USER], "chosen": said("x"), "rejected": said("y")},
        {"system": "Be brief.", "chosen": [USER, *said("x")], "rejected": [USER, *said("y")]},
        {"system": "Be brief.", "question": "Q?", "chosen": "x", "rejected": "y"},
    ],
    ids=["ShareGPT", "dialogues", "columns"],
)
def test_a_system_message_beside_the_others(jsonl, record):
    columns = {
        "instruction": "question",
        "system": "system",
        "completions": ["chosen", "rejected"],
        "ranks": "best_first",
    }
    source = DataSource(path=jsonl(record), **({"columns": columns} if "question" in record else {}))
    expected = [{"role": "system", "content": "Be brief."}, USER]
    assert read_ranked(source, CHAT)[0][0]["prompt"] == load_candidates(source, CHAT)[0][0]["prompt"] == expected
    if "question" in record:
        with pytest.raises(UserError, match="a system message, and the prompt is text"):
            read(source)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q?", "chosen": "x", "rejected": "y"},
        {"prompt": "Q?", "completions": ["x", "y"], "scores": [1, 0]},
        {"instruction": "Q?", "input": "", "output": "x"},
        {"prompt": "Q?", "completion": "x"},
    ],
)
def test_a_system_message_beside_text_is_not_lost(jsonl, record):
    read_ranked(DataSource(path=jsonl({**record, "system": " "})), PLAIN, pairs=False)
    with pytest.raises(UserError, match="a system message, and the prompt is text"):
        read_ranked(DataSource(path=jsonl({**record, "system": "Be brief."})), PLAIN, pairs=False)


def test_the_columns_that_the_error_names_keep_it_or_leave_it_out(jsonl):
    path = jsonl({"prompt": "Q?", "chosen": "x", "rejected": "y", "system": "Be brief."})
    columns = {"instruction": "prompt", "completions": ["chosen", "rejected"], "ranks": "best_first"}
    kept = read_ranked(DataSource(path=path, columns=columns | {"system": "system"}), CHAT)[0][0]
    assert kept["prompt"] == [{"role": "system", "content": "Be brief."}, USER]
    assert read_ranked(DataSource(path=path, columns=columns), CHAT)[0][0]["prompt"] == [USER]


def test_earlier_turns_beside_an_instruction_are_not_lost(jsonl):
    record = {"instruction": "Q?", "input": "", "output": "x", "system": "Be brief.", "history": []}
    [found] = read_ranked(DataSource(path=jsonl(record)), CHAT, pairs=False)[0]
    assert found["prompt"] == [{"role": "system", "content": "Be brief."}, USER]
    with pytest.raises(UserError, match="history"):
        read_ranked(DataSource(path=jsonl({**record, "history": [["a", "b"]]})), CHAT, pairs=False)


def test_a_system_message_is_not_given_twice(jsonl):
    own = [{"role": "system", "content": "Own."}, USER]
    record = {"system": "Be brief.", "messages": own, "chosen": said("x"), "rejected": said("y")}
    assert read_ranked(DataSource(path=jsonl(record)), CHAT)[0][0]["prompt"] == own


def test_several_chosen_or_rejected(jsonl):
    rows = [
        {"prompt": "Q?", "chosen": ["x"], "rejected": ["y", "z"]},
        {"prompt": "R?", "chosen": "x", "rejected": ["y"]},
    ]
    assert read(DataSource(path=jsonl(*rows)))[0] == [(["x", "y", "z"], [0, 1, 1]), (["x", "y"], [0, 1])]


def test_messages_that_are_only_text_fit_a_prompt_of_text(jsonl):
    path = jsonl({"prompt": "Q?", "chosen": said("x"), "rejected": said("y")})
    assert read(DataSource(path=path))[0] == [(["x", "y"], [0, 1])]
    call = [{**said("")[0], "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    with pytest.raises(UserError, match="the response is a list, not text"):
        read(DataSource(path=jsonl({"prompt": "Q?", "chosen": call, "rejected": said("y")})))


def test_the_format_is_told_by_the_first_record_without_missing_values(jsonl):
    whole = {"prompt": "Q?", "completions": ["x", "y"], "scores": [1, 0]}
    source = DataSource(path=jsonl({**whole, "completions": None}, whole))
    assert source_format(source)[0] == "ranked"
    with pytest.raises(UserError, match="line 1: the record has no responses"):
        read(source)
    with pytest.raises(UserError, match="line 1: no known format"):
        read(DataSource(path=jsonl({"frage": None}, {"frage": None})))


def test_a_row_that_cannot_be_used_does_not_spoil_its_prompt(jsonl):
    rows = [{"q": "Q?", "a": text, "s": score} for text, score in (("x", 1), ("y", None), ("z", 3), ("v", "good"))]
    options = {"columns": {"instruction": "q", "completions": "a", "scores": "s"}, "group_by": "q"}
    found, report = read(DataSource(path=jsonl(*rows), on_bad_row="skip", **options))
    assert found == [(["z", "x"], [0, 1])] and (report.omitted, report.responses) == (2, 4)
    with pytest.raises(UserError, match="line 2: the score is missing"):
        read(DataSource(path=jsonl(*rows), **options))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"Prompt": "q", "Chosen": "x", "Rejected": "y"},
         {"instruction": "Prompt", "completions": ["Chosen", "Rejected"], "ranks": "best_first"}),
        ({"system": "s", "input": "q", "chosen": "x", "rejected": "y"},
         {"instruction": "input", "system": "system", "completions": ["chosen", "rejected"], "ranks": "best_first"}),
        ({"question": {"full_text": "q", "id": 1}, "reply_0": "x", "reply_1": "y", "score_0": 0.5, "score_1": -0.5},
         {"instruction": "question.full_text", "completions": ["reply_0", "reply_1"],
          "scores": ["score_0", "score_1"]}),
        ({"info": {"post": "q"}, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 1},
         {"instruction": "info.post", "completions": "summaries[].text", "winner": "choice"}),
        ({"question": {"dataset": "d", "full_text": "q"},
          "answer_0": "x", "answer_1": "y", "score_0": 1, "score_1": -1},
         {"instruction": "question.full_text", "completions": ["answer_0", "answer_1"],
          "scores": ["score_0", "score_1"]}),
        ({"prompt": {"message_id": "t", "text": "q", "replies": [{"text": "x", "rank": 1}, {"text": "y", "rank": 0}]}},
         {"instruction": "prompt.text", "completions": "prompt.replies[].text", "ranks": "prompt.replies[].rank"}),
        ({"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": 2, "preference_statement": "s"},
         {"instruction": "prompt", "completions": ["response_1", "response_2"], "strength": "preference_strength"}),
        ({"question": "q", "response_A": "x", "response_B": "y", "label": "A>B"},
         {"instruction": "question", "completions": ["response_A", "response_B"], "winner": "label"}),
    ],
)  # fmt: skip
def test_suggestions(record, expected):
    settings, missing = suggest(record)
    assert settings["columns"] == expected and not missing


@pytest.mark.parametrize("more", [{"preference": 2}, {"label": 1}, {"preference_statement": "x is brief"},
                                  {"ratings": {"x": 1, "y": 2}}])  # fmt: skip
def test_what_is_not_clear_is_not_suggested(more):
    settings, missing = suggest({"question": "q", "answer_a": "x", "answer_b": "y", **more})
    assert not settings["columns"].keys() & {"winner", "strength", "scores"}
    assert missing[0].startswith("what orders the responses")


def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_text(json.dumps({"prompt": "Q?", "completions": ["x", "y"], "scores": [1, 0]}))
    with pytest.raises(UserError, match="compressed as its name says"):
        read(DataSource(path=str(path)))


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"messages": [USER, *said("x")], "rejected_response": "y"}, [USER]),
        ({"messages": [USER, *said("x")], "rejected_messages": [USER, *said("y")]}, [USER]),
        ({"trajectory": [{"from": "user", "value": "Q?"}], "chosen": "x", "rejected": "y"}, [USER]),
        ({"conversation": [USER], "chosen": said("x"), "rejected": said("y")}, [USER]),
    ],
    ids=["ms-swift", "ms-swift, dialogues", "UltraInteract", "conversation"],
)
def test_pairs_of_other_trainers(jsonl, record, prompt):
    [found] = read_ranked(DataSource(path=jsonl(record)), CHAT)[0]
    assert (found["prompt"], found["completions"], found["ranks"]) == (prompt, ["x", "y"], [0, 1])


ANTHROPIC = [
    {"role": "user", "content": [{"type": "text", "text": "Q?"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"text": "4"}]}]},
    *said("x"),
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "t1"}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"conversation": [USER, *said("x")]}, [USER]),
        ({"messages": [{"role": "User", "content": "Q?"}, {"role": "Chatbot", "content": "x"}]}, [USER]),
        ({"messages": ANTHROPIC}, [USER, {**said("")[0], "tool_calls": [CALL]},
                                   {"role": "tool", "content": "4", "tool_call_id": "t1"}]),
        ({"systemInstruction": {"parts": [{"text": "S"}]},
          "contents": [{"role": "user", "parts": [{"text": "Q?"}]}, {"role": "model", "parts": [{"text": "x"}]}]},
         [{"role": "system", "content": "S"}, USER]),
    ],
    ids=["WildChat", "Cohere", "Anthropic", "Gemini"],
)  # fmt: skip
def test_dialogues_of_other_services(jsonl, record, prompt):
    [found] = read_ranked(DataSource(path=jsonl(record)), CHAT, pairs=False)[0]
    assert (found["prompt"], found["completions"]) == (prompt, ["x"])


def test_a_dialogue_without_a_last_reply_is_a_prompt_and_no_answer(jsonl):
    source = DataSource(path=jsonl({"messages": [USER, *said("x"), USER]}))
    assert load_prompts(source, CHAT)[0][0]["prompt"] == [USER, *said("x"), USER]
    dialogues = {"chosen": [USER, *said("x"), USER], "rejected": [USER, *said("y"), USER]}
    pair = DataSource(path=jsonl(dialogues, name="pair.jsonl"))
    for one in (source, pair):
        with pytest.raises(UserError, match="ends with a message of the user"):
            read_ranked(one, CHAT, pairs=False)


def test_a_judge_sees_the_reasoning_in_any_spelling():
    for key in ("thinking", "reasoning_content"):
        assert message_text({**said("x")[0], key: "hm"}) == "hm\nx"
