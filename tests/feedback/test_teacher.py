"""Teachers: a local model against separate rows of plain transformers, recorded numbers, and every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rounding import logps_bound
from tiny_llama import RANKING, SFT, load_tiny, stack_on, write_base

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_candidates, load_ranked
from tuna_peft.errors import UserError
from tuna_peft.feedback.recorded import score_recorded
from tuna_peft.feedback.settings import ScoreSettings
from tuna_peft.feedback.teacher import _batches, score_rows
from tuna_peft.files import write_jsonl
from tuna_peft.journal import Journal
from tuna_peft.models.forward import scoring

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [
    {"id": f"r{i}", "prompt": f"w{i} w7 w9", "completions": ["w5", "w6 w8 w4", "w6 w8 w9 w11"], "reference": None}
    for i in range(3, 9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = load_tiny(write_base(tmp_path_factory.mktemp("base")))
    return stack_on(base, sft=SFT, ranking=RANKING), base.tokenizer


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "scores.journal.jsonl") as opened:
        yield opened


def settings(**options):
    return ScoreSettings(model="any", **options)


def plain_score(model, tokenizer, prompt, response, length_penalty=1.0):
    """By transformers alone: prompt, response and EOS in a row of their own."""
    start = tokenizer(prompt).input_ids
    ids = torch.tensor([tokenizer(f"{prompt} {response}").input_ids + [2]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    values = logps[len(start) - 1 : -1].gather(-1, ids[0, len(start) :, None])
    return values.sum().item() / len(values) ** length_penalty


def test_batches_fill_the_budget_and_no_more():
    encoded = {name: {"prompt_ids": [1], "completions_ids": [[2] * (size - 1)]}
               for name, size in {"a": 4, "b": 6, "c": 2, "d": 4, "e": 20}.items()}  # fmt: skip
    assert _batches(encoded, 8) == [["e"], ["b"], ["a", "d"], ["c"]]
    assert _batches(encoded, 12) == [["e"], ["b", "a"], ["d", "c"]]
    assert _batches(encoded, 1) == [["e"], ["b"], ["a"], ["d"], ["c"]]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 1.4])
def test_scores_are_those_of_separate_rows(model, journal, length_penalty):
    rows = [{**row, "completions": [f" {text}" for text in row["completions"]]} for row in ROWS]
    records, report = score_rows(*model, rows, settings(length_penalty=length_penalty), journal)
    for record, row in zip(records, ROWS, strict=True):
        expected = {
            f" {text}": plain_score(*model, row["prompt"], text, length_penalty) for text in row["completions"]
        }
        found = dict(zip(record["completions"], record["scores"], strict=True))
        bound = logps_bound(model[0], 5)  # a sum of at most five, divided or not
        assert found == pytest.approx(expected, rel=0, abs=bound)
        assert record["scores"] == sorted(record["scores"], reverse=True)
        assert record["lengths"] == [len(text.split()) + 1 for text in record["completions"]]
    assert records[0]["teacher"]["adapters"] == ["sft", "ranking"] and records[0]["length_penalty"] == length_penalty
    assert (report.rows, report.scored, report.responses, report.asked) == (6, 6, 18, 6)


def test_batches_and_memory_do_not_matter_and_nothing_is_computed_twice(model, journal, tmp_path, monkeypatch):
    records, _ = score_rows(*model, ROWS, settings(), journal)
    calls = []
    inner = scoring.response_logps

    def small(model, batch):
        calls.append(len(batch.ranks_BN))
        if len(batch.ranks_BN) > 2:
            raise torch.OutOfMemoryError
        return inner(model, batch)

    monkeypatch.setattr(scoring, "response_logps", small)
    with Journal(tmp_path / "other.jsonl") as other:
        again, _ = score_rows(*model, ROWS, settings(), other)
    assert calls == [6, 3, 1, 2, 3, 1, 2]
    for one, two in zip(records, again, strict=True):
        assert two["completions"] == one["completions"]
        assert two["scores"] == pytest.approx(one["scores"], rel=0, abs=logps_bound(model[0]))
    calls.clear()
    with Journal(tmp_path / "other.jsonl") as other:
        found, report = score_rows(*model, ROWS, settings(length_penalty=0.5), other)  # sums do not depend on it
    assert not calls and report.found == 6 and report.asked == 0 and len(found) == 6

    monkeypatch.setattr(scoring, "response_logps", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with Journal(tmp_path / "third.jsonl") as third, pytest.raises(UserError, match="does not fit into memory"):
        score_rows(*model, ROWS[:1], settings(), third)


def test_rows_without_a_pair_or_without_room_are_counted(model, journal):
    rows = [
        ROWS[0],
        {**ROWS[0], "id": "one", "completions": ["w5"]},
        {**ROWS[0], "id": "long", "completions": ["w5", "w6 " * 200]},
    ]
    records, report = score_rows(*model, rows, settings(), journal)
    assert [record["id"] for record in records] == ["r3"]
    assert report.left_out == {"one response": 1, "response too long": 1}
    with pytest.raises(UserError, match=r"ranks none of 1 prompts \(one response: 1\)"):
        score_rows(*model, rows[1:2], settings(), journal)


def test_the_file_is_read_as_ranked(model, journal, tmp_path):
    records, _ = score_rows(*model, ROWS, settings(), journal)
    write_jsonl(tmp_path / "scored.jsonl", records)
    dataset, report = load_ranked(DataSource(path=str(tmp_path / "scored.jsonl")), PromptConfig())
    assert report.kept == 6 and dataset[0]["scores"] == records[0]["scores"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either `model`"),
        ({"model": "a", "server": {"base_url": "http://x/v1", "model": "m"}}, "give either `model`"),
        ({"model": "a", "generate": {}}, "`generate` has no effect with `model`"),
        ({"model": "a", "tokenizer": "b"}, "`tokenizer` has no effect with `model`"),
        ({"server": {"base_url": "http://x/v1", "model": "m"}, "revision": "b"}, "`revision` has no effect"),
        (
            {"server": {"base_url": "http://x/v1", "model": "m"}, "generate": {}, "tokenizer": "b"},
            "the server counts its own tokens",
        ),
    ],
)
def test_settings_that_do_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        ScoreSettings.model_validate(values)


# Recorded log-probabilities


def recorded(tmp_path, row, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    columns = {"prompt": "p", "completions": "r[].t"}
    rows, _ = load_candidates(DataSource(path=str(path), columns=columns), PromptConfig())
    return score_recorded(rows, completions="r[].t", logprobs="r[].l", **options)


def test_sums_lists_and_lengths(tmp_path, model):
    sums = {"p": "w3 ", "r": [{"t": "w4 w5", "l": -2.0, "n": 2}, {"t": "w6", "l": -1.5, "n": 1}, {"t": "w6", "l": -9}]}
    sums["r"][2]["n"] = 4
    [record], report = recorded(tmp_path, sums, lengths="r[].n", teacher="big")
    assert record["completions"] == ["w4 w5", "w6"] and record["scores"] == [-1.0, -1.5]
    assert record["teacher"]["model"] == "big" and report.tokens == 3
    lists = {"p": "w3", "r": [{"t": "w4 w5", "l": [-1.0, -0.5, -3.0]}, {"t": "w6", "l": [-0.5]}]}
    [record], _ = recorded(tmp_path, lists)
    assert record["scores"] == [-0.5, -1.5] and record["lengths"] == [1, 3]
    del sums["r"][2]
    for response in sums["r"]:
        del response["n"]
    [record], _ = recorded(tmp_path, sums, tokenizer=model[1])
    assert record["lengths"] == [2, 1]  # the tokenizer's words, EOS not counted
    with pytest.raises(UserError, match="the numbers of tokens of the responses are unknown.*\n.*--tokenizer"):
        recorded(tmp_path, sums)


@pytest.mark.parametrize(
    ("logprob", "length", "message"),
    [
        (0.5, 1, "0.5 is not a log-probability"),
        (None, 1, "None is not a log-probability"),
        ("-1", 1, "'-1' is not a log-probability"),
        (float("nan"), 1, "nan is not a log-probability"),
        ([], 1, "the list of log-probabilities is empty"),
        ([-1.0, None], 2, "None is not a log-probability"),
        (-1.0, 0, "the length is 0, not a number of tokens"),
        (-1.0, 2.5, "the length is 2.5"),
    ],
)
def test_values_that_are_no_log_probabilities(tmp_path, logprob, length, message):
    row = {"p": "w3", "r": [{"t": "a", "l": -1.0, "n": 1}, {"t": "b", "l": logprob, "n": length}]}
    with pytest.raises(UserError, match=rf"prompt line-1, candidate 1: {message}"):
        recorded(tmp_path, row, lengths="r[].n")
    with pytest.raises(UserError, match=r"ranks none of 1 prompts \(bad score: 1\)"):
        recorded(tmp_path, row, lengths="r[].n", skip_bad_rows=True)


def test_recorded_values_of_a_real_teacher():
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "llama2-7b")
    source = DataSource(
        path=str(SHARED / "teacher_logprobs" / "arena_llama33_70b.jsonl"),
        columns={"instruction": "instruction", "completions": "responses[].text", "id": "id"},
        on_bad_row="skip", limit=40,
    )  # fmt: skip
    rows, _ = load_candidates(source, PromptConfig())
    records, report = score_recorded(
        rows, completions="responses[].text", logprobs="responses[].logprob_sum", tokenizer=tokenizer,
        skip_bad_rows=True,
    )  # fmt: skip
    assert report.scored + sum(report.left_out.values()) == len(rows) and report.scored > 30
    for record in records:
        plain = [len(tokenizer.encode(text, add_special_tokens=False)) for text in record["completions"]]
        assert record["lengths"] == pytest.approx(plain, abs=2)  # the first piece may join the prompt's last


def test_what_the_template_changes_is_one_line_whatever_the_number_of_rows(model, journal, monkeypatch, caplog):
    stack, tokenizer = model
    upper = "{% for m in messages %}{{ m['content'] | upper }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", upper)
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    _, report = score_rows(stack, tokenizer, rows, settings(), journal)
    warned = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert report.changes and len(warned) == len(report.changes)
    assert max(report.changes.values()) >= len(ROWS)
