"""Counts of pairs against a loop over all of them, and means whose sums outlive a process."""

from __future__ import annotations

import itertools

import pytest
import torch

from tuna_peft.training.metrics import RunningMeans, add_ranking_metrics, pair_statistics

RANKS = [[0, 1, 2, 3], [0, 1, 1, -1], [0, 0, 0, 1], [2, 1, 0, -1]]  # in order, ties, missing ones, reversed


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_pairs_are_counted_one_by_one(margin):
    """Scores on a grid of 0.25, exact in fp32: equal ones, and leads of one margin where two are needed."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(-4, 5, (50, 4), generator=draw) / 4
    ranks = torch.tensor(RANKS)[torch.randint(0, len(RANKS), (50,), generator=draw)]
    right = satisfied = pairs = 0
    for of_scores, of_ranks in zip(scores.tolist(), ranks.tolist(), strict=True):
        for i, j in itertools.permutations(range(4), 2):
            if 0 <= of_ranks[i] < of_ranks[j]:
                lead, steps = of_scores[i] - of_scores[j], of_ranks[j] - of_ranks[i]
                pairs, right, satisfied = pairs + 1, right + (lead > 0), satisfied + (lead >= margin * steps)
    assert [int(value) for value in pair_statistics(scores, ranks, margin)] == [right, satisfied, pairs]
    assert 0 < right < pairs and right != satisfied


def test_means_weigh_by_counts_and_can_be_kept_and_copied():
    means = RunningMeans()
    scores, ranks = torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[0, 1, -1]])
    add_ranking_metrics(means, scores, ranks, 1.0)
    copy = means.copy()
    add_ranking_metrics(means, torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0, 1, 2]]), 1.0)
    kept = means.sums()
    assert kept["ranking_accuracy"] == (1 + 2, 1 + 3) and kept["margin_satisfaction"] == (1 + 1, 1 + 3)
    assert kept["scores/rank_0"] == (3 + 1, 2) and kept["scores/rank_2"] == (0, 1)
    assert copy.pop() == {"ranking_accuracy": 1.0, "margin_satisfaction": 1.0, "scores/rank_0": 3.0,
                          "scores/rank_1": 1.0}  # fmt: skip
    other = RunningMeans()
    other.add("gone", 1.0, 1.0)
    other.restore(kept)
    assert other.sums() == kept and other.pop()["ranking_accuracy"] == 3 / 4
    assert other.pop() == {}
