"""Joint tokenisation: boundaries, BOS and EOS, overflow.

Ids: <s> 0, </s> 1, a 3, b 4, c 5, d 6, x 7, y 8, newline 9, ab 10, cd 11.
"""

import random

import datasets
import pytest

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.encoder import TokenReport
from tuna_peft.data.ranked import normalise
from tuna_peft.data.texts import prompt_ids, prompt_text
from tuna_peft.data.tokenize import encode_dataset, encode_ranked
from tuna_peft.errors import UserError


def record(prompt, completions, reference=None, ranks=None):
    ranks = list(range(len(completions))) if ranks is None else ranks
    row = {"id": "1", "prompt": prompt, "completions": completions, "ranks": ranks, "reference": reference}
    return normalise(row, "row 0").record


def encode(tokenizer, *args, max_length=None, **options):
    row = record(*args, **{key: options.pop(key) for key in ("reference", "ranks") if key in options})
    return encode_ranked(row, tokenizer, max_length=max_length, where="row 0", **options)


def encode_sft(tokenizer, prompt, completion, max_length=None, **options):
    rows = datasets.Dataset.from_list([{"prompt": prompt, "completion": completion}])
    [row], _ = encode_dataset(rows, tokenizer, max_length=max_length, **options)
    return row


def test_plain(tokenizer):
    assert encode(tokenizer, "xy", ["ab", "c"], reference="dd") == {
        "id": "1",
        "prompt_ids": [0, 7, 8],
        "completions_ids": [[10, 1], [5, 1]],
        "completion_skips": [0, 0],
        "ranks": [0, 1],
        "scores": None,
        "reference_ids": [6, 6, 1],
        "reference_skip": 0,
    }


def test_a_merge_over_the_boundary(tokenizer):
    """Behind "xa", "b" makes the token "ab" and "c" does not: the shared prompt ends before the "a"."""
    row = encode(tokenizer, "xa", ["b", "c"], reference="d")
    assert row["prompt_ids"] == [0, 7]
    assert row["completions_ids"] == [[10, 1], [3, 5, 1]]
    assert row["completion_skips"] == [0, 1]  # the "a" before "c" is prompt: no loss on it
    assert (row["reference_ids"], row["reference_skip"]) == ([3, 6, 1], 1)


def test_the_boundary_may_merge_in_the_reference_alone(tokenizer):
    row = encode(tokenizer, "xa", ["c", "d"], reference="b")
    assert (row["prompt_ids"], row["completion_skips"], row["reference_skip"]) == ([0, 7], [1, 1], 0)


def test_eos_is_there_once_even_as_pad_or_in_the_text(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode(tokenizer, "x", ["a</s>", "c</s>d"], prompt=PromptConfig(rendering="lenient"))
    assert row["completions_ids"] == [[3, 1], [5, 1, 6, 1]]


def test_bos_and_eos_of_the_tokenizer(make_tokenizer):
    both = make_tokenizer(eos_suffix=True)
    row = encode(both, "x", ["a", "c"])
    assert (row["prompt_ids"], row["completions_ids"]) == ([0, 7], [[3, 1], [5, 1]])
    assert prompt_ids("x", both) == [0, 7]
    assert encode(make_tokenizer(bos=False), "x", ["a", "c"])["prompt_ids"] == [7]
    assert encode(make_tokenizer(), "<s>x", ["a", "c"])["prompt_ids"] == [0, 7]


def test_no_prompt_token_of_its_own(make_tokenizer):
    with pytest.raises(UserError, match="row 0: no token of the prompt stands before its responses"):
        encode(make_tokenizer(bos=False), "a", ["b", "c"])


def test_no_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        encode(tokenizer, "x", ["a", "c"])


def test_chat(chat_tokenizer):
    """The template writes <s> and </s> itself, and a newline behind </s> that is dropped."""
    messages = [{"role": "user", "content": "c"}]
    assert prompt_text(messages, chat_tokenizer) == "<s>xc\ny"
    assert prompt_text("xc", chat_tokenizer) == "xc"
    assert prompt_ids(messages, chat_tokenizer) == [0, 7, 5, 9, 8]
    row = encode(chat_tokenizer, messages, ["ab", "d"], reference="c")
    assert row["prompt_ids"] == [0, 7, 5, 9, 8]
    assert row["completions_ids"] == [[10, 1], [6, 1]]
    assert row["reference_ids"] == [5, 1]
    longer = [*messages, {"role": "assistant", "content": "d"}, {"role": "user", "content": "a"}]
    assert encode(chat_tokenizer, longer, ["ab", "d"])["prompt_ids"] == [0, 7, 5, 9, 8, 6, 1, 9, 7, 3, 9, 8]


def test_a_chat_template_without_eos_gets_one(chat_tokenizer):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(" + eos_token", "")
    row = encode(chat_tokenizer, [{"role": "user", "content": "c"}], ["ab", "d"])
    assert row["completions_ids"] == [[10, 9, 1], [6, 9, 1]]


def test_chat_errors(tokenizer, chat_tokenizer):
    with pytest.raises(UserError) as caught:
        encode(tokenizer, [{"role": "user", "content": "c"}], ["a", "b"])
    assert "no chat template" in caught.value.what
    assert "template: alpaca" in caught.value.fix
    with pytest.raises(UserError) as caught:
        encode(chat_tokenizer, [{"role": "system", "content": "c"}], ["a", "b"])
    assert caught.value.where == "row 0"
    assert "only user and assistant" in caught.value.what


def test_a_template_that_drops_the_response(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{{ bos_token }}x{{ messages[0]['content'] }}{{ eos_token }}")
    with pytest.raises(UserError, match="candidate 0 .*generation starts from|candidate 0 .*changes the response"):
        encode(tokenizer, [{"role": "user", "content": "c"}], ["ab", "d"])


def test_too_long_is_an_error_by_default(tokenizer):
    assert encode(tokenizer, "xy", ["c", "dd"], max_length=6)["completions_ids"] == [[5, 1], [6, 6, 1]]
    with pytest.raises(UserError) as caught:
        encode(tokenizer, "xy", ["c", "ddd"], max_length=6)
    assert caught.value.where == "row 0, candidate 1 (in rank order)"
    assert caught.value.what == "too long: prompt 3 + response 4 tokens, max_length is 6"
    assert "Raise max_length to 7" in caught.value.fix
    with pytest.raises(UserError) as caught:
        encode(tokenizer, "xy", ["c", "d"], reference="ddd", max_length=6)
    assert caught.value.where == "row 0, reference"


def test_cut(tokenizer):
    report = TokenReport()
    options = {"reference": "ccc", "max_length": 5, "overflow": "cut", "report": report}
    row = encode(tokenizer, "xy", ["c", "dd"], **options)
    assert row["completions_ids"] == [[5, 1], [6, 6]]  # no EOS where the end is cut off
    assert row["reference_ids"] == [5, 5]
    assert report.as_dict() == {
        "rows": 1, "responses": 3, "kept": 1, "responses_cut": 2, "responses_dropped": 0, "responses_merged": 0,
        "prompt_tokens": 3, "response_tokens": 4, "longest": 5, "skipped": {}, "changes": {}, "rows_dropped": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("overflow", "what"), [("error", "does not fit"), ("cut", "would be truncated to nothing")])
@pytest.mark.parametrize("max_length", [3, 2])
def test_nothing_is_cut_to_nothing(tokenizer, overflow, what, max_length):
    with pytest.raises(UserError) as caught:
        encode(tokenizer, "xy", ["c", "d"], max_length=max_length, overflow=overflow)
    assert caught.value.where == "row 0"
    assert f"the prompt has 3 tokens and max_length is {max_length}: candidate 0 {what}" in caught.value.what
    assert "Raise max_length above 3" in caught.value.fix


def test_skip(tokenizer):
    report = TokenReport()
    options = {"max_length": 5, "overflow": "skip", "report": report}
    row = encode(tokenizer, "xy", ["d", "ddd", "c", "b"], ranks=[0, 1, 2, 2], reference="ddd", **options)
    assert row["completions_ids"] == [[6, 1], [5, 1], [4, 1]]
    assert row["ranks"] == [0, 1, 1]  # dense again
    assert (row["reference_ids"], row["reference_skip"]) == (None, None)
    assert (report.responses_dropped, report.kept) == (2, 1)
    # One rank left, a reference that is needed, and a prompt that is too long: the row goes.
    assert encode(tokenizer, "xy", ["ddd", "c", "b"], ranks=[0, 1, 1], **options) is None
    assert encode(tokenizer, "xy", ["ddd", "ccc"], **options) is None
    assert encode(tokenizer, "xy", ["c", "d"], reference="ddd", needs_reference=True, **options) is None
    assert encode(tokenizer, "xyxyxy", ["c", "d"], **options) is None
    assert report.as_dict()["rows_dropped"] == 4
    assert report.response_tokens == 6


def test_scores_follow_their_candidates(tokenizer):
    row = normalise({"prompt": "x", "completions": ["c", "ddd", "b"], "scores": [1, 2, 3]}, "row 0").record
    encoded = encode_ranked(row, tokenizer, max_length=4, overflow="skip")
    assert (encoded["completions_ids"], encoded["scores"]) == ([[4, 1], [5, 1]], [3.0, 1.0])


def test_needed_reference(tokenizer):
    with pytest.raises(UserError, match="row 0: there is no reference response"):
        encode(tokenizer, "x", ["a", "c"], needs_reference=True)


def test_sft(tokenizer):
    assert encode_sft(tokenizer, "xa", "cd") == {
        "id": "row 0",
        "input_ids": [0, 7, 3, 11, 1],
        "completion_mask": [0, 0, 0, 1, 1],
        "labels": [-100, -100, -100, 11, 1],
    }
    merged = encode_sft(tokenizer, "xa", "b")
    assert (merged["input_ids"], merged["completion_mask"]) == ([0, 7, 10, 1], [0, 0, 1, 1])
    cut = encode_sft(tokenizer, "x", "ddd", max_length=4, overflow="cut")
    assert (cut["input_ids"], cut["labels"]) == ([0, 7, 6, 6], [-100, -100, 6, 6])
    with pytest.raises(UserError, match="none of the 1 rows fits"):
        encode_sft(tokenizer, "x", "ddd", max_length=4, overflow="skip")
    with pytest.raises(UserError, match="row 0, candidate 0: the response is empty"):
        encode_sft(tokenizer, "x", "")


def test_sft_messages(chat_tokenizer):
    prompt, completion = [{"role": "user", "content": "c"}], [{"role": "assistant", "content": "ab"}]
    encoded = encode_sft(chat_tokenizer, prompt, completion)
    assert encoded["input_ids"] == [0, 7, 5, 9, 8, 10, 1]
    assert encoded["completion_mask"] == [0, 0, 0, 0, 0, 1, 1]


def test_dataset_equals_row_by_row(tokenizer):
    rng = random.Random(0)
    rows = []
    while len(rows) < 600:  # more than two chunks
        texts = ["".join(rng.choices("abcd", k=rng.randint(1, 6))) for _ in range(rng.randint(2, 5))]
        row = {
            "prompt": "".join(rng.choices("xya", k=3)),
            "completions": texts,
            "scores": [rng.random() for _ in texts],
        }
        if len(set(texts)) > 1:
            rows.append({"id": str(len(rows)), **row, "reference": rng.choice([None, "ab"])})
    dataset = datasets.Dataset.from_list(rows)
    encoded, report = encode_dataset(dataset, tokenizer, max_length=8, overflow="skip")
    one_by_one = TokenReport()
    expected = [
        encode_ranked(normalise(row, "r").record, tokenizer, max_length=8, overflow="skip", report=one_by_one)
        for row in rows
    ]
    assert list(encoded) == [row for row in expected if row is not None]
    assert report == one_by_one
    assert 0 < report.kept < report.rows == 600
    again, _ = encode_dataset(dataset, tokenizer, max_length=8, overflow="skip")
    assert list(again) == list(encoded)
    for row in encoded:
        original = rows[int(row["id"])]
        for ids, skip in zip(row["completions_ids"], row["completion_skips"], strict=True):
            joint = row["prompt_ids"] + ids
            text = tokenizer.decode(joint[1:-1])
            assert text.startswith(original["prompt"])
            assert text.removeprefix(original["prompt"]) in original["completions"]
            assert joint == [*tokenizer(text)["input_ids"], 1]
            assert joint.count(1) == 1
            assert skip < len(ids)


def test_dataset_of_trl_types(tokenizer):
    preference = datasets.Dataset.from_list([{"prompt": "x", "chosen": "a", "rejected": "c"}])
    row = encode_dataset(preference, tokenizer, max_length=None)[0][0]
    assert (row["completions_ids"], row["ranks"]) == ([[3, 1], [5, 1]], [0, 1])
    sft = datasets.Dataset.from_list([{"prompt": "x", "completion": "a"}])
    encoded, report = encode_dataset(sft, tokenizer, max_length=None)
    assert encoded[0] == {"id": "row 0", "input_ids": [0, 7, 3, 1], "completion_mask": [0, 0, 1, 1],
                          "labels": [-100, -100, 3, 1]}  # fmt: skip
    assert (report.rows, report.prompt_tokens, report.response_tokens, report.longest) == (1, 2, 2, 4)


def test_bad_rows_of_a_dataset_are_left_out_only_when_told(tokenizer):
    row = {"id": "1", "prompt": "x", "completions": ["a", "c"], "ranks": [0, 1], "reference": "d"}
    rows = [row, {**row, "id": "2", "reference": None}, {**row, "id": "3", "completions": ["a", "dddd"]}]
    dataset = datasets.Dataset.from_list(rows)
    options = {"max_length": 5, "needs_reference": True}
    with pytest.raises(UserError, match=r"row 1 \(id 2\): there is no reference response"):
        encode_dataset(dataset, tokenizer, **options)
    encoded, report = encode_dataset(dataset, tokenizer, on_bad_row="skip", **options)
    assert encoded["id"][:] == ["1"]
    assert (report.rows, report.kept, report.as_dict()["rows_dropped"]) == (3, 1, 2)


def test_dataset_errors(tokenizer):
    with pytest.raises(UserError) as caught:
        encode_dataset(datasets.Dataset.from_list([{"text": "x"}]), tokenizer, max_length=None)
    assert "the columns text" in caught.value.what
    assert "prompt, completions and scores" in caught.value.fix
    rows = [{"id": "q7", "prompt": "x", "completions": ["a", "c"], "scores": [1.0, 1.0]}]
    with pytest.raises(UserError) as caught:
        encode_dataset(datasets.Dataset.from_list(rows), tokenizer, max_length=None)
    assert caught.value.where == "row 0 (id q7)"
    rows[0]["scores"] = [1.0, 2.0]
    with pytest.raises(UserError, match="none of the 1 rows fits into max_length 2"):
        encode_dataset(datasets.Dataset.from_list(rows), tokenizer, max_length=2, overflow="skip")


PROMPTS = ["### Response:", "### Response: ", "### Response:\n", "Q: 1 + 1 =", "Say (", "日本", "Jo", "a  ", "x\n\n"]
RESPONSES = ["Hello", " Hello", "\nHello", "  two", ")", "hn", ":)", "本", "</s>", "🙂", "1", " 2"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_sentencepiece_boundaries(llama_tokenizer, prompt):
    """Whatever merges: every joint sequence is the tokenizer's own for the whole text, and the parts add up."""
    row = encode(llama_tokenizer, prompt, RESPONSES)
    alone = llama_tokenizer(prompt)["input_ids"]
    assert row["prompt_ids"] == alone[: len(row["prompt_ids"])]
    assert row["prompt_ids"][0] == 1
    for response, ids, skip in zip(RESPONSES, row["completions_ids"], row["completion_skips"], strict=True):
        joint = llama_tokenizer(prompt + response)["input_ids"]
        assert row["prompt_ids"] + ids == (joint if joint[-1] == 2 else [*joint, 2])
        own = len(row["prompt_ids"]) + skip
        assert alone[:own] == joint[:own]
        assert alone[own : own + 1] != joint[own : own + 1]
        assert len(ids) > skip


def test_a_known_sentencepiece_merge(llama_tokenizer):
    """ "Response: " ends in the token "_" alone; "_Hello" swallows it, "\\n" does not."""
    row = encode(llama_tokenizer, "Response: ", ["Hello", "\nHello"])
    tokens = [llama_tokenizer.convert_ids_to_tokens(ids) for ids in row["completions_ids"]]
    assert llama_tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["<s>", "▁Response", ":"]
    assert tokens == [["▁Hello", "</s>"], ["▁", "<0x0A>", "Hello", "</s>"]]
    assert row["completion_skips"] == [0, 1]


def test_responses_that_are_equal_once_they_are_truncated_are_merged_and_counted(tokenizer):
    record = {"id": "0", "prompt": "x", "completions": ["aaab", "b", "aaaa"], "scores": [3.0, 2.0, 1.0],
              "ranks": [0, 1, 2], "reference": None}  # fmt: skip
    report = TokenReport()
    row = encode_ranked(record, tokenizer, max_length=4, overflow="cut", report=report)
    assert (row["ranks"], row["scores"]) == ([0, 1], [3.0, 2.0])
    assert (report.responses, report.responses_cut, report.responses_merged) == (3, 2, 1)


def test_a_prompt_that_is_no_unicode_text_is_named(tokenizer):
    with pytest.raises(UserError, match="character 2 is"):  # a byte that is not UTF-8, as Python takes it from a shell
        prompt_ids("ab\udcff", tokenizer)
