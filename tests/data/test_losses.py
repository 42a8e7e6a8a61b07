"""What is left out is said: one line each, with its share; a warning with the key that would keep it."""

import logging

import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import encode_source
from tuna_peft.data.losses import describe_losses, report_losses

PLAIN = PromptConfig(template="none")
GOOD = {"prompt": "x", "completions": ["a", "b"], "scores": [1, 0]}


@pytest.fixture
def counts(jsonl, tokenizer):
    def read(*records, max_length=None, overflow="skip"):
        source = DataSource(path=jsonl(*records), on_bad_row="skip")
        config = type("Config", (), {"get_text_config": lambda self: self})()
        _, found = encode_source(source, PLAIN, tokenizer, config, max_length=max_length, overflow=overflow)
        return source, found

    return read


def test_nothing_lost_says_nothing(counts):
    assert describe_losses(counts(GOOD, GOOD)[1]) == []


def test_each_kind_has_a_line(counts):
    tied, repeats = {**GOOD, "scores": [1, 1]}, {**GOOD, "completions": ["a", "b", "a"], "scores": [2, 1, 0]}
    long = {**GOOD, "completions": ["a", "b", "a" * 40], "scores": [2, 1, 0]}
    _, found = counts(*[GOOD] * 17, tied, repeats, long, max_length=10)
    lines = describe_losses(found)
    assert lines == [
        "1 of 20 records are skipped: all tied (5.0%)",
        "1 of 40 responses repeat another one of their record and are merged (2.5%)",
        "1 of 39 responses are too long and are skipped (2.6%)",
    ]


def test_a_row_that_the_tokenizer_or_template_refuses_is_not_called_too_long(counts, tokenizer):
    typed, long = {**GOOD, "completions": [f"a{tokenizer.eos_token}b", "b"]}, {**GOOD, "prompt": "x" * 30}
    _, found = counts(*[GOOD] * 3, typed, long, max_length=20)
    assert describe_losses(found) == [
        "1 of 5 rows are skipped: special token in a response (20.0%); "
        "to keep them, correct them; `on_bad_row: error` names the first one",
        "1 of 5 rows are skipped as too long (20.0%); to keep them, raise `train.max_length`, or set `overflow: cut`",
    ]


def test_more_than_a_tenth_is_a_warning_with_the_key(counts, caplog):
    long = {**GOOD, "prompt": "x" * 30}
    source, found = counts(*[GOOD] * 4, long, max_length=10)
    with caplog.at_level(logging.INFO, logger="tuna_peft"):
        report_losses(source, found)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "1 of 5 rows are skipped as too long" in record.message and "(20.0%)" in record.message
    assert "`train.max_length`" in record.message
    caplog.clear()
    source, found = counts(*[GOOD] * 19, long, max_length=10)
    with caplog.at_level(logging.INFO, logger="tuna_peft"):
        report_losses(source, found)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    caplog.clear()
    source, found = counts(*[GOOD] * 9, long, max_length=10)
    with caplog.at_level(logging.INFO, logger="tuna_peft"):
        report_losses(source, found)
    assert [record.levelname for record in caplog.records] == ["INFO"]  # exactly a tenth
