"""The noise study: how many lists are wrong, and what of them; its bins; its rows, each run once."""

from __future__ import annotations

import json
import math

import torch

from benchmarks import noise
from benchmarks.contest.objectives import in_two_bins

ROWS = [
    {"completions_ids": [[k], [k, 1], [k, 2], [k, 3]], "ranks": [0, 1, 1, 2], "scores": [3.0, 2.0, 2.0, 1.0]}
    for k in range(2000)
]


def test_a_wrong_list_has_its_responses_in_another_order():
    assert noise.with_noise(ROWS, 0.0, 0) == ROWS
    for probability in (0.2, 1.0):
        noisy = noise.with_noise(ROWS, probability, 0)
        wrong = [row for row, right in zip(noisy, ROWS, strict=True) if row["ranks"] != right["ranks"]]
        # Within four standard deviations of a binomial distribution.
        spread = math.sqrt(len(ROWS) * probability * (1 - probability))
        assert abs(len(wrong) - probability * len(ROWS)) <= 4 * spread
        for row, right in zip(noisy, ROWS, strict=True):
            assert row["completions_ids"] == right["completions_ids"]
            assert sorted(zip(row["ranks"], row["scores"], strict=True)) == [(0, 3.0), (1, 2.0), (1, 2.0), (2, 1.0)]
        assert noise.with_noise(ROWS, probability, 0) == noisy != noise.with_noise(ROWS, probability, 1)


def test_two_bins_are_the_better_and_the_worse_half_of_the_ranks():
    seen = []
    loss = in_two_bins(lambda scores, ranks, grades: seen.append(ranks))
    loss(None, torch.tensor([[0, 1, 2, 3, -1], [0, 1, 2, 3, 4], [0, 0, 1, -1, -1]]), None)
    assert seen[0].tolist() == [[0, 0, 1, 1, -1], [0, 0, 0, 1, 1], [0, 0, 1, -1, -1]]


def test_each_run_is_made_once_and_the_rate_is_chosen_on_validation(tmp_path, monkeypatch):
    made = []

    def trained(start, objective, rows, **settings):
        arm = next(name for name, each in noise.ARMS.items() if each is objective)
        made.append((arm, settings["learning_rate"], settings["seed"]))
        return made[-1], 0.5

    def measured(model, tokenizer, split):
        arm, rate, _ = model
        best = (rate == noise.RATES[1]) == (arm == "full")
        return {"ranking_accuracy": 0.5 + 0.1 * best, "response_score": 0.5}

    monkeypatch.setattr(noise, "trained", trained)
    monkeypatch.setattr(noise, "measured", measured)
    monkeypatch.setattr(noise, "load_start", lambda: (None, None))
    monkeypatch.setattr(noise.data, "training_lists", lambda tokenizer, judge_error: ROWS[:5])
    for name in ("validation", "test"):
        monkeypatch.setattr(noise.data, name, lambda tokenizer: None)
    file = tmp_path / "noise.jsonl"
    noise.Study(file).run([0, 1])
    assert len(made) == 6 + 2 * 15
    assert {rate for arm, rate, seed in made if seed < 100 and arm == "full"} == {noise.RATES[1]}
    assert {rate for arm, rate, seed in made if seed < 100 and arm != "full"} == {noise.RATES[0]}
    assert len({json.loads(line)["key"] for line in file.read_text().splitlines()}) == len(made)
    noise.Study(file).run([0, 1])
    assert len(made) == 36
    assert "| full | 0.600 ± 0.000 |" in noise.tables(noise.read(file))
