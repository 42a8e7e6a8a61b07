"""Conversion to the ranked type and back."""

import json
import os
import random

import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.convert import convert
from tuna_peft.data.load import load_ranked
from tuna_peft.errors import UserError

TEXTS = ["a", "b\u2028c", 'quote " and \\', "日本 🙂", " space ", "new\nline", "\ttab", "{}", "é"]


@pytest.fixture
def source(jsonl):
    """Random records with ties, duplicates, references, and scores that need all their digits."""
    rng = random.Random(1)
    rows = []
    for number in range(100):
        n = rng.randint(2, 5)
        scores = [rng.choice([0.1 + 0.2, 1 / 3, -1e-300, 12345678.9]) for _ in range(n)]
        row = {"instruction": rng.choice(TEXTS), "c": rng.choices(TEXTS, k=n), "s": scores, "id": f"é{number}"}
        rows.append({**row, "r": rng.choice([None, *TEXTS])})
    columns = {"instruction": "instruction", "completions": "c", "scores": "s", "reference": "r", "id": "id"}
    return DataSource(path=jsonl(*rows), columns=columns, on_bad_row="skip")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_round_trip(source, tmp_path, ending, template):
    prompt = PromptConfig(template=template)
    out = tmp_path / "new" / f"ranked.{ending}"
    report = convert(source, prompt, out)
    before, read = load_ranked(source, prompt)
    assert report == read
    assert 0 < report.kept < 100
    for format in ("ranked", "auto"):
        after, again = load_ranked(DataSource(path=str(out), format=format), prompt)
        assert list(after) == list(before)
        assert after.features == before.features
        assert (again.read, again.kept, again.duplicates_merged) == (report.kept, report.kept, 0)
    assert os.listdir(out.parent) == [out.name]


def test_ranks_without_scores(jsonl, tmp_path):
    source = DataSource(path=jsonl({"prompt": "p", "chosen": "x", "rejected": "y"}))
    convert(source, PromptConfig(), tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "id": "line-1", "prompt": "p", "completions": ["x", "y"], "scores": None, "ranks": [0, 1], "reference": None,
    }  # fmt: skip


def test_a_failure_leaves_the_old_file(jsonl, tmp_path, monkeypatch):
    source = DataSource(path=jsonl({"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "x"}))
    for name in ("out.jsonl", "out.parquet"):
        (tmp_path / name).write_text("old")
        with pytest.raises(UserError, match="line 2"):
            convert(source, PromptConfig(), tmp_path / name)

        def fail(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(UserError, match="the disk is full"):
                convert(source.model_copy(update={"limit": 1}), PromptConfig(), tmp_path / name)
        assert (tmp_path / name).read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "out.jsonl", "out.parquet"]


def test_refused_targets(jsonl, tmp_path):
    source = DataSource(path=jsonl({"prompt": "p", "chosen": "x", "rejected": "y"}))
    with pytest.raises(UserError, match="cannot write .csv"):
        convert(source, PromptConfig(), tmp_path / "out.csv")
    with pytest.raises(UserError, match="this is the source itself"):
        convert(source, PromptConfig(), source.path)
