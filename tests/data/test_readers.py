"""Each record shape, with the exact ranked record that it must give."""

import math

import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_prompts, load_ranked, load_sft, source_format
from tuna_peft.data.ranked import ReadReport
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="Q: {instruction} {input}A:", template_no_input="Q: {instruction}A:")


def load(path, prompt=PLAIN, **options):
    dataset, report = load_ranked(DataSource(path=path, **options), prompt)
    return list(dataset), report


def ranked(completions, ranks, scores=None, prompt="Q: Sort. b aA:", reference=None, id="line-1"):
    return {
        "id": id,
        "prompt": prompt,
        "completions": completions,
        "scores": scores,
        "ranks": ranks,
        "reference": reference,
    }


TEACHER = {
    "orig": {"instruction": "Sort.", "input": "b a", "output": "a b"},
    "text": ["b a", "a, b", "ab"],
    "avg_token_prob": [-2.0, -0.5, -1.0],
    "length": [2, 4, 1],
    "logprob": [-4.0, -2.0, -1.0],
}


def test_ranked(jsonl):
    row = {"id": 5, "prompt": "p", "completions": ["x", "y"], "scores": [0, 1], "reference": "r"}
    other = {"prompt": "p", "completions": ["x", "y"], "scores": None, "ranks": [1, 0]}
    rows, report = load(jsonl(row, other))
    assert rows == [
        ranked(["y", "x"], [0, 1], [1.0, 0.0], "p", "r", "5"),
        ranked(["y", "x"], [0, 1], None, "p", None, "line-2"),
    ]
    assert report == ReadReport(read=2, kept=2, responses=4)


def test_teacher(jsonl):
    expected = ranked(["a, b", "ab", "b a"], [0, 1, 2], [-0.5, -1.0, -2.0], reference="a b")
    assert load(jsonl(TEACHER))[0] == [expected]
    averages_alone = {key: value for key, value in TEACHER.items() if key not in ("logprob", "length")}
    assert load(jsonl(averages_alone))[0] == [expected]
    lists = {**averages_alone, "logprob": [[-1.5, -2.5], [-0.5] * 4, [-1.0]]}
    del lists["avg_token_prob"]
    assert load(jsonl(lists))[0] == [expected]


@pytest.mark.parametrize("removed", ["logprob", "avg_token_prob"])
def test_teacher_length_penalty(jsonl, removed):
    path = jsonl({key: value for key, value in TEACHER.items() if key != removed})
    row = load(path, length_penalty=0)[0][0]
    assert (row["completions"], row["scores"]) == (["ab", "a, b", "b a"], [-1.0, -2.0, -4.0])
    row = load(path, length_penalty=0.5)[0][0]
    assert row["scores"] == [-1.0, -1.0, pytest.approx(-4 / math.sqrt(2))]
    assert row["ranks"] == [0, 0, 1]


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"logprob": [-4.0, 0.9, -1.0]}, ", candidate 1", "never above 0"),
        ({"logprob": None, "avg_token_prob": [0.2, 0.3, 0.4]}, ", candidate 0", "never above 0"),
        ({"length": [2, 4, 0]}, ", candidate 2", "not a number of tokens"),
        ({"length": [2, 4]}, "", "3 responses, but 2 entries in `length`"),
        ({"logprob": [-1, [float("nan")], -1]}, ", candidate 1", "`logprob` is nan"),
        ({"logprob": None, "avg_token_prob": [-1, None, -1]}, ", candidate 1", "neither `logprob` nor"),
        ({"orig": {"input": "b a"}}, "", "instruction is missing"),
        ({"orig": "Sort."}, "", "`orig` is str, not an object"),
        ({"text": "ab"}, "", "`text` is str, not a list"),
    ],
)
def test_bad_teacher_records(jsonl, change, where, what):
    path = jsonl({**TEACHER, **change})
    with pytest.raises(UserError) as caught:
        load(path, format="teacher")
    assert caught.value.where == f"{path}: line 1{where}"
    assert what in caught.value.what


def test_teacher_with_the_reference_in_the_list(jsonl):
    row = load(jsonl(TEACHER), add_reference="best")[0][0]
    assert row == ranked(["a b", "a, b", "ab", "b a"], [0, 1, 2, 3], [0.5, -0.5, -1.0, -2.0], reference="a b")
    row = load(jsonl(TEACHER), add_reference="worst")[0][0]
    assert (row["completions"][-1], row["scores"][-1]) == ("a b", -3.0)
    bare = {**TEACHER, "orig": {"instruction": "Sort.", "output": ""}}
    assert load(jsonl(bare))[0][0]["reference"] is None
    with pytest.raises(UserError, match="no reference response to add"):
        load(jsonl(bare), add_reference="best")


JUDGE = {
    "prompt": "Rank these ...",
    "instruct": "### Instruction: Sort.\n### Response:",
    "generation": ["b a", "a b", "b a", "zzz"],
    "id": "j1",
    "gpt_eval": "...",
    "rank_str": "[1, 0]",
    "rank": [1, 0],
    "response_4": "a, b",
}


def test_judge(jsonl):
    """Response 2 repeats the ranked response 0; responses 3 and 4 are not ranked."""
    rows, report = load(jsonl(JUDGE))
    assert rows == [ranked(["a b", "b a"], [0, 1], prompt=JUDGE["instruct"], id="j1")]
    assert (report.duplicates_merged, report.omitted) == (1, 2)


def test_judge_ranks_its_own_answer(jsonl):
    row = {key: value for key, value in JUDGE.items() if key != "rank"}
    rows, report = load(jsonl({**row, "ranks": ["4", 1, 3, 0]}))
    assert rows[0]["completions"] == ["a, b", "a b", "zzz", "b a"]
    assert rows[0]["ranks"] == [0, 1, 2, 3]
    assert (report.duplicates_merged, report.omitted) == (1, 0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rank": [1, 5]}, "entry 1 of the rank is 5"),
        ({"rank": [1, 4], "response_4": ""}, "only one response is left of 4"),
        ({"rank": [1, 0, 1]}, "names response 1 twice"),
        ({"rank": [1]}, "only one response is left of 5"),
        ({"rank": []}, "none of the responses is ranked"),
        ({"rank": [1, "x"]}, "entry 1 of the rank is 'x'"),
        ({"rank": [1, 0], "generation": ["", "a"]}, "response is empty"),
        ({"rank": "1, 0"}, "`rank` is str, not a list"),
        ({"rank": None}, "has no `ranks`"),
    ],
)
def test_bad_judge_records(jsonl, change, what):
    with pytest.raises(UserError) as caught:
        load(jsonl({**JUDGE, **change}), format="judge")
    assert what in caught.value.what


ANSWER = """The instruction is open-ended.

###Response 4:
First paragraph.

Second paragraph.

There are no duplicate responses.

Response 0: 7
Response 1: 9
Response 2: 5
Response 3: 3
Response 4: 14

rank: [4, 1, 0, 2, 3] (out of 15)"""
WRITTEN = {  # by the reference's writer: a fragment of the answer, and every number after "rank:"
    **JUDGE, "generation": ["a", "b", "c", "d"], "gpt_eval": ANSWER, "rank_str": "[4, 1, 0, 2, 3] (out of 15)",
    "response_4": "First paragraph.",
}  # fmt: skip
del WRITTEN["rank"]


def test_the_answer_of_the_judge_completes_the_record(jsonl):
    rows, report = load(jsonl({**WRITTEN, "ranks": [4, 1, 0, 2, 3]}))
    assert rows[0]["completions"] == ["First paragraph.\n\nSecond paragraph.", "b", "a", "c", "d"]
    assert (report.comparisons, report.contradictions) == (1, 0)


def test_a_rank_that_the_answer_contradicts_is_corrected_and_named(jsonl):
    path = jsonl({**WRITTEN, "ranks": [4, 1, 0, 2, 3]}, {**WRITTEN, "ranks": [4, 1, 0, 2, 3, 15]})
    rows, report = load(path)
    assert rows[0]["completions"] == rows[1]["completions"]
    assert (report.comparisons, report.contradictions) == (2, 1)
    assert report.first_contradiction == f"{path}: line 2"


def test_a_ranked_answer_that_is_missing_costs_no_more_than_itself(jsonl):
    rows, _ = load(jsonl({**JUDGE, "rank": [4, 1, 0], "response_4": ""}))
    assert rows[0]["completions"] == ["a b", "b a"]
    answer = ANSWER.replace("###Response 4:", "Mine:")
    rows, _ = load(jsonl({**WRITTEN, "gpt_eval": answer, "response_4": "", "ranks": [4, 1, 0, 2, 3]}))
    assert rows[0]["completions"] == ["b", "a", "c", "d"]


def test_formatted(jsonl):
    row = {"instruction": "Full prompt:", "output": ["x", "y", "z"], "score": [1, 3, 1], "id": 9}
    assert load(jsonl(row))[0] == [ranked(["y", "x", "z"], [0, 1, 1], [3.0, 1.0, 1.0], "Full prompt:", None, "9")]
    with pytest.raises(UserError, match="3 responses, but 2 scores"):
        load(jsonl({**row, "score": [1, 2]}))


def test_preference(jsonl):
    assert load(jsonl({"prompt": "p", "chosen": "x", "rejected": "y"}))[0] == [ranked(["x", "y"], [0, 1], prompt="p")]
    messages = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
    }
    assert load(jsonl(messages))[0] == [ranked(["x", "y"], [0, 1], prompt=messages["prompt"])]
    whole = {**messages, "chosen": messages["prompt"] + messages["chosen"]}
    with pytest.raises(UserError, match="candidate 0: a response of 2 messages, one is expected"):
        load(jsonl(whole))  # only one of the two is a whole dialogue
    with pytest.raises(UserError, match="text in some records and messages in others"):
        load(jsonl({"prompt": "p", "chosen": "x", "rejected": "y"}, messages))
    with pytest.raises(UserError, match="has no `rejected`"):
        load(jsonl({"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "x"}))


def test_alpaca(jsonl):
    path = jsonl({"instruction": "Sort.", "input": "b a", "output": "a b"}, {"instruction": "Hi.", "output": "Ho."})
    dataset, _ = load_sft(DataSource(path=path), PLAIN)
    assert list(dataset) == [
        {"id": "line-1", "prompt": "Q: Sort. b aA:", "completion": "a b"},
        {"id": "line-2", "prompt": "Q: Hi.A:", "completion": "Ho."},
    ]
    with pytest.raises(UserError, match="only one response, ranking needs at least two"):
        load(path)
    dataset, _ = load_sft(DataSource(path=path), PromptConfig(template="chat"))
    assert dataset[1]["prompt"] == [{"role": "user", "content": "Hi."}]
    assert dataset[1]["completion"] == [{"role": "assistant", "content": "Ho."}]


def test_supervision_from_ranked_data_is_the_best_response(jsonl):
    tied = {**TEACHER, "text": ["x", "y", "x"], "logprob": None, "avg_token_prob": [-1, -1, -1]}
    dataset, report = load_sft(DataSource(path=jsonl(TEACHER, tied)), PLAIN)
    assert dataset["completion"][:] == ["a, b", "x"]
    assert report.duplicates_merged == 1
    dataset, _ = load_sft(DataSource(path=jsonl(TEACHER), add_reference="best"), PLAIN)
    assert dataset["completion"][:] == ["a b"]


NESTED = {
    "meta": {"key.with.dots": 3, "uid": 17},
    "q": "Sort.",
    "ctx": None,
    "responses": [
        {"text": "b", "judge": {"score": 0.5}, "ok": False},
        {"text": "a", "judge": {"score": 2}, "ok": True},
    ],
    "gold": "a!",
    "turns": [{"content": "first"}, {"content": "last"}],
    "flat": ["c", "d"],
}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"completions": "responses[].text", "scores": "responses[].judge.score", "id": "meta.uid"},
            ranked(["a", "b"], [0, 1], [2.0, 0.5], "Q: Sort.A:", None, "17"),
        ),
        (
            {"completions": "responses[].text", "scores": "responses[].ok", "reference": "gold", "input": "ctx"},
            ranked(["a", "b"], [0, 1], [1.0, 0.0], "Q: Sort.A:", "a!"),
        ),
        ({"completions": "flat", "ranks": "best_first"}, ranked(["c", "d"], [0, 1], None, "Q: Sort.A:")),
        (
            {
                "completions": ["turns[0].content", "turns[-1].content"],
                "scores": ["responses[0].judge.score", "meta.uid"],
            },
            ranked(["last", "first"], [0, 1], [17.0, 0.5], "Q: Sort.A:"),
        ),
    ],
)
def test_columns(jsonl, columns, expected):
    assert load(jsonl(NESTED), columns={"instruction": "q", **columns})[0] == [expected]


def test_columns_with_a_full_prompt_and_a_dotted_key(jsonl):
    row = {"a.b": "p", "xs": [{"ys": ["c", "d"]}, {"ys": ["e"]}], "r": [2, 1, 0]}
    columns = {"prompt": "a.b", "completions": "xs[].ys[]", "ranks": "r"}
    assert load(jsonl(row), columns=columns)[0] == [ranked(["e", "d", "c"], [0, 1, 2], prompt="p")]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"completions": "response[].text"}, "`response[].text`: the record has no key `response`"),
        ({"completions": "responses[].txt"}, "responses[0] has no key `txt`"),
        ({"completions": "gold[].text"}, "gold is str, not a list"),
        ({"completions": "q.text"}, "q has no key `text`, it is str"),
        ({"completions": "responses[7].text"}, "responses has 2 entries, none at [7]"),
        ({"completions": "ctx", "scores": "flat"}, "no responses"),
        ({"completions": "flat", "scores": "flat"}, "score is the text"),
        ({"completions": "flat"}, "neither scores nor ranks"),
        ({"scores": "flat"}, "`columns` has no `completions`"),
        ({"completions": "flat", "input": "flat"}, "the input is list, not text"),
        ({"completions": "flat", "input": "responses[].text"}, "gives a list, but one value is expected"),
    ],
)
def test_bad_columns(jsonl, columns, what):
    with pytest.raises(UserError) as caught:
        load(jsonl(NESTED), columns={"instruction": "q", **columns})
    assert what in caught.value.what
    assert caught.value.fix


def test_auto_names_the_keys_found_and_the_formats_known(jsonl):
    with pytest.raises(UserError) as caught:
        load(jsonl({"meta": 1, "q": "Sort."}))
    assert "`meta`, `q`" in caught.value.what
    for name in ("ranked", "teacher", "judge", "formatted", "preference", "alpaca", "`columns: {", "--column"):
        assert name in caught.value.fix


@pytest.mark.parametrize(("key", "text"), [("messages", "content"), ("conversations", "value")])
def test_what_a_chat_log_is_told_to_do_works(jsonl, key, text):
    path = jsonl({key: [{text: "Name a colour."}, {text: "Blue."}]})
    with pytest.raises(UserError, match=rf"instruction: {key}\[0\].{text}, completions: {key}\[1\].{text}"):
        load(path)
    columns = {"instruction": f"{key}[0].{text}", "completions": f"{key}[1].{text}"}
    dataset, _ = load_sft(DataSource(path=path, columns=columns), PLAIN)
    assert dataset[0] == {"id": "line-1", "prompt": "Q: Name a colour.A:", "completion": "Blue."}


def test_auto(jsonl):
    assert source_format(DataSource(path=jsonl(TEACHER)))[0] == "teacher"
    assert source_format(DataSource(path=jsonl(JUDGE)))[0] == "judge"
    assert source_format(DataSource(path=jsonl({"instruction": "i", "input": "", "output": "o"})))[0] == "alpaca"


def test_a_length_penalty_without_effect_is_refused(jsonl):
    with pytest.raises(UserError, match="`length_penalty` has no effect on data in the `judge` format"):
        load(jsonl(JUDGE), length_penalty=0.5)


def test_bad_rows_are_skipped_and_counted_only_when_told(jsonl):
    tied = {**TEACHER, "logprob": [-4.0, -8.0, -2.0]}
    empty = {**TEACHER, "text": ["", "a", "b"]}
    path = jsonl(TEACHER, tied, empty, tied)
    with pytest.raises(UserError) as caught:
        load(path)
    assert caught.value.where == f"{path}: line 2"
    assert "on_bad_row: skip" in caught.value.fix
    rows, report = load(path, on_bad_row="skip")
    assert len(rows) == report.kept == 1
    assert report.skipped == {"all tied": 2, "empty response": 1}
    with pytest.raises(UserError) as caught:
        load(jsonl(tied, empty), on_bad_row="skip")
    assert "none of the 2 records can be used (all tied: 1, empty response: 1)" in caught.value.what


def test_prompts_alone(jsonl):
    teacher = jsonl(TEACHER)
    [row], report = load_prompts(DataSource(path=teacher), PLAIN)
    assert row == {"id": "line-1", "prompt": "Q: Sort. b aA:", "reference": "a b", "record": TEACHER}
    assert report == ReadReport(read=1, kept=1)
    bare = jsonl({"instruction": "Hi.", "id": 3}, {"instruction": ""})
    with pytest.raises(UserError, match="line 2: the instruction is missing"):
        load_prompts(DataSource(path=bare), PLAIN)
    prompts, report = load_prompts(DataSource(path=bare, on_bad_row="skip"), PLAIN)
    assert prompts == [{"id": "3", "prompt": "Q: Hi.A:", "reference": None, "record": {"instruction": "Hi.", "id": 3}}]
    assert report.skipped == {"no prompt": 1}
    assert load_prompts(DataSource(path=jsonl({"prompt": "p"})), PLAIN)[0][0]["prompt"] == "p"
    question = DataSource(path=jsonl({"text": "Why?"}), columns={"instruction": "text"})
    assert load_prompts(question, PLAIN)[0][0]["prompt"] == "Q: Why?A:"
