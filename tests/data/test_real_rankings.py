"""Real files from ../shared/data, read and tokenised with the real LLaMA tokenizer."""

import json

import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.convert import convert
from tuna_peft.data.load import load_prompts, load_ranked, load_sft
from tuna_peft.data.tokenize import encode_dataset
from tuna_peft.errors import UserError

TEXTS = {"instruction": "instruction", "input": "input", "completions": "responses[].text", "id": "id"}


def source(shared, name, **options):
    columns = {**TEXTS, **options.pop("columns")}
    return DataSource(path=str(shared / "ranked" / f"{name}.jsonl"), columns=columns, **options)


def check_tokens(dataset, tokenizer, max_length, overflow, rendering="strict"):
    prompt = PromptConfig(rendering=rendering)
    encoded, report = encode_dataset(dataset, tokenizer, max_length=max_length, overflow=overflow, prompt=prompt)
    by_id = {row["id"]: row for row in dataset}
    assert report.rows == len(dataset)
    assert report.kept == len(encoded)
    tokens = 0
    for row in encoded:
        whole = [row["prompt_ids"] + ids for ids in row["completions_ids"]]
        assert max(map(len, whole)) <= max_length
        assert len(set(row["ranks"])) > 1
        if overflow == "skip":
            assert all(ids[-1] == tokenizer.eos_token_id for ids in whole)
            joint = [by_id[row["id"]]["prompt"] + text for text in by_id[row["id"]]["completions"]]
            assert set(map(tuple, whole)) <= {(*ids, tokenizer.eos_token_id) for ids in tokenizer(joint)["input_ids"]}
        assert all(len(ids) > skip for ids, skip in zip(row["completions_ids"], row["completion_skips"], strict=True))
        tokens += sum(map(len, row["completions_ids"])) - sum(row["completion_skips"])
    assert report.response_tokens == tokens
    return report


def test_alpaca_eval(shared, llama_tokenizer):
    given = source(shared, "alpaca_eval", columns={"scores": "responses[].score"})
    dataset, report = load_ranked(given, PromptConfig())
    assert (report.read, report.kept, report.skipped) == (561, 561, {})
    assert (report.responses, report.duplicates_merged, report.omitted) == (2805, 1, 0)
    raw = json.loads((shared / "ranked" / "alpaca_eval.jsonl").read_text().splitlines()[0])
    best = max(raw["responses"], key=lambda response: response["score"])
    assert dataset[0]["completions"][0] == best["text"]
    assert dataset[0]["id"] == raw["id"]
    assert raw["instruction"] in dataset[0]["prompt"]
    # Three real responses hold "</s>" in the middle.
    with pytest.raises(UserError, match=r"contains '</s>'.*3 of 561 rows"):
        check_tokens(dataset, llama_tokenizer, 512, "skip")
    report = check_tokens(dataset, llama_tokenizer, 512, "skip", "lenient")
    assert report.responses_dropped > 0
    assert report.changes == {"special token in a response": 3}


def test_arena_judged(shared, llama_tokenizer):
    given = source(shared, "arena_judged", columns={"scores": "responses[].judge_score"}, on_bad_row="skip")
    dataset, report = load_ranked(given, PromptConfig())
    assert report.skipped == {"all tied": 20, "one response": 2}
    assert (report.kept, report.duplicates_merged) == (778, 72)
    assert any(len(row["completions"]) < 5 for row in dataset)
    assert any(len(set(row["ranks"])) < len(row["ranks"]) for row in dataset)
    with pytest.raises(UserError) as caught:
        encode_dataset(dataset, llama_tokenizer, max_length=64)
    assert "(id arena_" in caught.value.where
    assert check_tokens(dataset.select(range(200)), llama_tokenizer, 700, "skip").kept > 100


def test_gsm8k(shared, llama_tokenizer):
    columns = {"scores": "responses[].correct", "reference": "original"}
    with pytest.raises(UserError, match=r"line \d+: all 4 responses are tied"):
        load_ranked(source(shared, "gsm8k_solutions", columns=columns), PromptConfig())
    given = source(shared, "gsm8k_solutions", columns=columns, on_bad_row="skip")
    dataset, report = load_ranked(given, PromptConfig())
    assert report.skipped == {"all tied": 445}
    assert {score for row in dataset for score in row["scores"]} == {0.0, 1.0}
    assert all(row["reference"] for row in dataset)
    assert check_tokens(dataset, llama_tokenizer, 400, "cut").responses_cut > 0
    # With the reference in the list every record has a pair.
    dataset, report = load_ranked(given.model_copy(update={"add_reference": "best"}), PromptConfig())
    assert report.kept == 990


def test_alpaca_sft(shared, llama_tokenizer):
    given = DataSource(path=str(shared / "sft" / "alpaca_5000.json"), split="train[:20%]", on_bad_row="skip")
    dataset, report = load_sft(given, PromptConfig())
    assert report.read == 1000
    assert report.kept + sum(report.skipped.values()) == 1000
    assert set(report.skipped) <= {"empty response"}
    encoded, tokens = encode_dataset(dataset, llama_tokenizer, max_length=1024)
    assert tokens.kept == len(encoded) == len(dataset)
    for row, given_row in zip(encoded, dataset, strict=True):
        text = given_row["prompt"] + given_row["completion"]
        assert row["input_ids"] == [*llama_tokenizer(text)["input_ids"], llama_tokenizer.eos_token_id]
        prompt_length = row["completion_mask"].index(1)
        assert set(row["completion_mask"][prompt_length:]) == {1}
        loss = llama_tokenizer.decode([token for token in row["labels"] if token != -100])
        assert loss.strip().endswith("</s>")


def test_prompts_and_conversion(shared, tmp_path):
    vicuna = DataSource(
        path=str(shared / "vicuna80" / "question.jsonl"), columns={"instruction": "text", "id": "question_id"}
    )
    prompts, report = load_prompts(vicuna, PromptConfig(template="chat"))
    assert (len(prompts), report.kept) == (80, 80)
    given = source(shared, "gsm8k_solutions", columns={"scores": "responses[].correct"}, on_bad_row="skip")
    convert(given, PromptConfig(), tmp_path / "out.parquet")
    dataset, _ = load_ranked(DataSource(path=str(tmp_path / "out.parquet")), PromptConfig())
    assert list(dataset) == list(load_ranked(given, PromptConfig())[0])
