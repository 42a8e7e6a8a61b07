"""A file of our own in the true shape of each public data set, read by `format: auto` and by name."""

import json
from typing import get_args

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tuna_peft.data.config import DataSource, FormatName, PromptConfig
from tuna_peft.data.load import load_sft, read_ranked, source_format
from tuna_peft.data.readers import FORMATS
from tuna_peft.data.shapes import SHAPES
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="{instruction}{input}", template_no_input="{instruction}")


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def helpsteer(response, helpfulness, prompt="Name a colour."):
    grades = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **grades}


def shp(a, b, label):
    return {
        "post_id": "p1", "domain": "askculinary_train", "upvote_ratio": 0.9, "history": "Salt?", "c_root_id_A": "x",
        "human_ref_A": a, "human_ref_B": b, "labels": label, "score_A": 10, "score_B": 3, "score_ratio": 3.3,
    }  # fmt: skip


# name: records, prompt, responses with their ranks
FILES = {
    "ultrafeedback": (
        [{
            "source": "flan", "instruction": "Name a colour.", "models": ["m1", "m2"], "correct_answers": ["None"],
            "incorrect_answers": ["None"],
            "completions": [
                {"model": "m1", "principle": "helpfulness", "custom_system_prompt": "Be nice.", "response": "Colour",
                 "critique": "Too short.", "overall_score": 2.5, "fine-grained_score": 2.0,
                 "annotations": {"helpfulness": {"Rating": "2", "Rationale": "r"}}},
                {"model": "m2", "principle": "honesty", "custom_system_prompt": "Be honest.", "response": "Blue.",
                 "critique": "Good.", "overall_score": 8.0, "fine-grained_score": 4.75,
                 "annotations": {"helpfulness": {"Rating": "5", "Rationale": "r"}}},
            ],
        }],
        "Name a colour.", [("Blue.", 0), ("Colour", 1)],
    ),
    "list-ultrafeedback": (
        [{"prompt": "Name a colour.", "prompt_id": "f00", "all_responses": ["Colour", "Blue.", "Red"],
          "overall_scores": [0.1, 0.9, 0.5]}],
        "Name a colour.", [("Blue.", 0), ("Red", 1), ("Colour", 2)],
    ),
    "nectar": (
        [{"prompt": "\n\nHuman: Name a colour.\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["lmsys"],
          "good_natured": True,
          "answers": [{"answer": "Colour", "model": "m1", "rank": 2.0},
                      {"answer": "Blue.", "model": "m2", "rank": 1.0}]}],
        "\n\nHuman: Name a colour.\n\nAssistant: ", [("Blue.", 0), ("Colour", 1)],
    ),
    "helpsteer2": (
        [helpsteer("Colour", 1), helpsteer("Blue.", 4), helpsteer("Red", 1)],
        "Name a colour.", [("Blue.", 0), ("Colour", 1), ("Red", 1)],
    ),
    "helpsteer3": (
        [{"domain": "general", "language": "english", "context": user("Name a colour."), "response1": "Colour",
          "response2": "Blue.", "overall_preference": 2, "individual_preference": [{"score": 2, "reasoning": "r"}]}],
        user("Name a colour."), [("Blue.", 0), ("Colour", 1)],
    ),
    "shp": (
        [shp("A bit.", "None.", 1), shp("A lot.", "A bit.", 0), shp("None.", "A lot.", 0)],
        "Salt?", [("A bit.", 0), ("A lot.", 1), ("None.", 2)],
    ),
    "arena": (
        [{"question_id": "q", "model_a": "m1", "model_b": "m2", "winner": "model_b", "judge": "user_1", "turn": 1,
          "anony": True, "language": "English", "tstamp": 1.0,
          "conversation_a": user("Name a colour.") + assistant("Colour"),
          "conversation_b": user("Name a colour.") + assistant("Blue.")}],
        "Name a colour.", [("Blue.", 0), ("Colour", 1)],
    ),
    "pandalm": (
        [{"idx": 0, "motivation_app": "Gmail", "cmp_key": "m1_m2", "instruction": "Sort.", "input": "b a",
          "response1": "b a", "response2": "a b", "annotator1": 2, "annotator2": 0, "annotator3": 2}],
        "Sort.b a", [("a b", 0), ("b a", 1)],
    ),
    "nemo-rl": (
        [{"context": user("Name a colour."),
          "completions": [{"rank": 1, "completion": assistant("Colour"), "reward": 0.1},
                          {"rank": 0, "completion": assistant("Blue."), "reward": 0.9}]}],
        user("Name a colour."), [("Blue.", 0), ("Colour", 1)],
    ),
    "openai-preference": (
        [{"input": {"messages": user("Name a colour.")}, "preferred_output": assistant("Blue."),
          "non_preferred_output": assistant("Colour")}],
        user("Name a colour."), [("Blue.", 0), ("Colour", 1)],
    ),
    "scored-lists": (
        [{"prompt_id": "f", "prompt": "Name a colour.", "all_generated_responses": ["Colour", "Blue."],
          "all_rm_scores": [0.1, 0.2]}],
        "Name a colour.", [("Blue.", 0), ("Colour", 1)],
    ),
    "unpaired": (
        [{"prompt": "p", "completion": "Colour", "label": False},
         {"prompt": "p", "completion": "Blue.", "label": True}],
        "p", [("Blue.", 0), ("Colour", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("named", [False, True], ids=["auto", "by name"])
def test_a_public_shape(jsonl, name, named):
    records, prompt, responses = FILES[name]
    source = DataSource(path=jsonl(*records), format=name if named else "auto")
    assert source_format(source)[0] == name
    read, report = read_ranked(source, PLAIN)
    assert report.kept == 1
    assert read[0]["prompt"] == prompt
    assert list(zip(read[0]["completions"], read[0]["ranks"], strict=True)) == responses


# The same for the data sets that are pairs: what `auto` calls them, the record, and the prompt with `template: chat`.
PAIRS = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        "preference",
        {"prompt": "Name a colour.", "prompt_id": "f0", "chosen": user("Name a colour.") + assistant("Blue."),
         "rejected": user("Name a colour.") + assistant("Colour"),
         "messages": user("Name a colour.") + assistant("Blue."), "score_chosen": 8.0, "score_rejected": 3.5},
        user("Name a colour."),
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        "preference",
        {"source": "Airoboros", "chosen": user("Hi") + assistant("Hi.") + user("Name a colour.") + assistant("Blue."),
         "rejected": user("Hi") + assistant("Hi.") + user("Name a colour.") + assistant("Colour"),
         "prompt": "Name a colour.", "question": ""},
        user("Hi") + assistant("Hi.") + user("Name a colour."),
    ),
    "Anthropic/hh-rlhf": (
        "transcript",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: Name a colour.\n\nAssistant: Blue.",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: Name a colour.\n\nAssistant: Colour"},
        user("Hi") + assistant("Hi.") + user("Name a colour."),
    ),
    "ShareGPT": (
        "preference",
        {"conversations": [{"from": "human", "value": "Name a colour."}], "chosen": {"from": "gpt", "value": "Blue."},
         "rejected": {"from": "gpt", "value": "Colour"}, "system": ""},
        user("Name a colour."),
    ),
    "TRL, explicit prompt": (
        "preference",
        {"prompt": user("Name a colour."), "chosen": assistant("Blue."), "rejected": assistant("Colour")},
        user("Name a colour."),
    ),
    "TRL, implicit prompt": (
        "preference",
        {"chosen": user("Name a colour.") + assistant("Blue."),
         "rejected": user("Name a colour.") + assistant("Colour")},
        user("Name a colour."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs(jsonl, tmp_path, name, ending):
    format, record, prompt = PAIRS[name]
    path = jsonl(record)
    if ending == "parquet":
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    source = DataSource(path=path)
    assert source_format(source)[0] == format
    [read], _ = read_ranked(source, PromptConfig(template="chat"))
    assert (read["prompt"], read["completions"], read["ranks"]) == (prompt, ["Blue.", "Colour"], [0, 1])


def test_every_shape_has_a_file_and_a_name():
    assert set(get_args(FormatName)) == {"auto", *FORMATS, *SHAPES}
    assert set(FILES) == SHAPES.keys() - {"labels", "prompt-completion"}


def test_prompt_completion_is_supervision(jsonl):
    dataset, _ = load_sft(DataSource(path=jsonl({"prompt": "p", "completion": "c"})), PLAIN)
    assert dataset[0] == {"id": "line-1", "prompt": "p", "completion": "c"}


def test_two_readings_are_both_named(jsonl):
    path = jsonl({"prompt": "p", "completions": ["x", "y"], "labels": [False, True]})
    with pytest.raises(UserError, match="several responses with a label each, or TRL's stepwise supervision"):
        read_ranked(DataSource(path=path), PLAIN)
    assert read_ranked(DataSource(path=path, format="labels"), PLAIN)[0][0]["completions"] == ["y", "x"]
    [row], *_ = FILES["scored-lists"]
    path = jsonl({**row, "chosen": "Blue.", "rejected": "Colour"})
    with pytest.raises(UserError, match="`preference` or `scored-lists`"):
        read_ranked(DataSource(path=path), PLAIN)
    assert read_ranked(DataSource(path=path, format="preference"), PLAIN)[0][0]["completions"] == ["Blue.", "Colour"]


def test_a_list_as_json_text_in_a_table(tmp_path):
    path = tmp_path / "arena.csv"  # the shape of the arena's file of 2024: every text is a JSON list of turns
    quoted = [json.dumps([text]).replace('"', '""') for text in ("Name a colour.", "Colour", "Blue.")]
    cells = ",".join(f'"{cell}"' for cell in quoted)
    path.write_text(f"id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n1,{cells},0,1,0\n")
    columns = {
        "instruction": "prompt[0]",
        "completions": ["response_a[0]", "response_b[0]"],
        "scores": ["winner_model_a", "winner_model_b"],
    }
    [record], _ = read_ranked(DataSource(path=str(path), columns=columns), PLAIN)
    assert (record["prompt"], record["completions"]) == ("Name a colour.", ["Blue.", "Colour"])


def test_an_entry_of_llama_factory(jsonl, tmp_path):
    jsonl({"q": "Sort.", "ctx": "b a", "good": "a b", "bad": "b a"}, name="pairs.jsonl")
    jsonl({"instruction": "Sort.", "input": "b a", "output": "a b"}, name="sft.jsonl")
    names = {"prompt": "q", "query": "ctx", "chosen": "good", "rejected": "bad"}
    entries = {
        "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": names},
        "plain": {"file_name": "sft.jsonl"},
        "kto": {"file_name": "kto.jsonl", "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
        "talk": {"file_name": "kto.jsonl", "columns": {"prompt": "q", "response": "a", "history": "h"}},
        "script": {"script_url": "x.py"},
        "chats": {"file_name": "chats.jsonl", "formatting": "sharegpt"},
        "rated": {
            "file_name": "rated.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": {"content_tag": "content"},
        },
        "odd": {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}},
    }
    path = str(tmp_path / "dataset_info.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    [record], _ = read_ranked(DataSource(path=path, name="pairs"), PLAIN)
    assert (record["prompt"], record["completions"]) == ("Sort.b a", ["a b", "b a"])
    dataset, _ = load_sft(DataSource(path=path, name="plain"), PLAIN)
    assert dataset[0]["completion"] == "a b"
    turns = [{"from": "human", "value": "Sort."}, {"from": "gpt", "value": "a b"}]
    jsonl({"conversations": turns, "system": "Be brief."}, name="chats.jsonl")
    dataset, _ = load_sft(DataSource(path=path, name="chats"), PLAIN)
    assert [message["role"] for message in dataset[0]["prompt"]] == ["system", "user"]
    jsonl({"q": "Sort.", "a": "b a", "good": False}, {"q": "Sort.", "a": "a b", "good": True}, name="kto.jsonl")
    assert read_ranked(DataSource(path=path, name="kto"), PLAIN)[0][0]["completions"] == ["a b", "b a"]
    rated = [
        {"messages": user("Sort.") + assistant(text), "label": good} for text, good in (("b a", False), ("a b", True))
    ]
    jsonl(*rated, name="rated.jsonl")
    [record], _ = read_ranked(DataSource(path=path, name="rated"), PromptConfig(template="chat"))
    assert (record["prompt"], record["completions"]) == (user("Sort."), ["a b", "b a"])
    wrong = {None: "which entry is meant", "pair": "no entry 'pair'", "script": "neither `file_name`",
             "odd": "whole conversations", "talk": "`history`"}  # fmt: skip
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            read_ranked(DataSource(path=path, name=name), PLAIN)


def test_an_arena_vote_is_on_all_turns(jsonl):
    [short], _, _ = FILES["arena"]
    said = {name: short[f"conversation_{name}"] + user("Another.") + assistant(name) for name in "ab"}
    path = jsonl({**short, "conversation_a": said["a"], "conversation_b": said["b"]}, short)
    chat = PromptConfig(template="chat")
    [long, other], _ = read_ranked(DataSource(path=path), chat)
    assert long["prompt"] == other["prompt"] == user("Name a colour.")
    assert long["completions"] == [said["b"][1:], said["a"][1:]] and other["completions"] == ["Blue.", "Colour"]
    with pytest.raises(UserError, match="dialogues of several turns") as caught:
        read_ranked(DataSource(path=path), PLAIN)
    assert "template: chat" in caught.value.fix and caught.value.where.endswith("line 1")
    records, report = read_ranked(DataSource(path=path, on_bad_row="skip"), PLAIN)
    assert [record["completions"] for record in records] == [["Blue.", "Colour"]]
    assert report.skipped == {"several turns": 1}


@pytest.mark.parametrize(
    ("record", "format", "prompt"),
    [
        ({"instruction": "Sort.", "input": "", "output": "b a", "label": False}, "alpaca", PLAIN),
        ({"messages": user("Sort.") + assistant("b a"), "label": False}, "messages", PromptConfig(template="chat")),
    ],
)
def test_single_responses_with_a_label_are_not_imitated_unasked(jsonl, record, format, prompt):
    """KTO's data: supervised training would imitate the bad responses as well."""
    good = json.loads(json.dumps(record).replace("b a", "a b")) | {"label": True}
    path = jsonl(record, good)
    with pytest.raises(UserError, match="supervised training would imitate bad responses too") as error:
        load_sft(DataSource(path=path), prompt)
    settings = yaml.safe_load("{" + error.value.fix.split("`")[1] + "}")
    [ranked], _ = read_ranked(DataSource.model_validate({"path": path, **settings}), prompt)
    assert ranked["completions"] == ["a b", "b a"]
    assert len(load_sft(DataSource(path=path, format=format), prompt)[0]) == 2
