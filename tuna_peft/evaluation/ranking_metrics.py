"""Agreement between the order of responses by v and their given order, for one prompt. `ranking` calls it.

v is a response's length-normalized log-probability; rank 0 is the best response. Two responses with equal v count half
in the metrics of the best response (`top1_hit`, `reciprocal_rank`) and as wrong in those of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Two responses of unequal rank.

    Attributes:
        v_gap: v of the better response minus v of the worse one.
        rank_gap: Rank of the worse response minus rank of the better one.
        length_ratio: Tokens of the better response / tokens of the worse one.
    """

    v_gap: float
    rank_gap: int
    length_ratio: float


def pairs_of(v: Sequence[float], ranks: Sequence[int], lengths: Sequence[int]) -> list[Pair]:
    """All pairs of unequal rank."""
    places = range(len(v))
    return [
        Pair(v[i] - v[j], ranks[j] - ranks[i], lengths[i] / lengths[j])
        for i in places
        for j in places
        if ranks[i] < ranks[j]
    ]


def kendall_tau_b(v: Sequence[float], ranks: Sequence[int]) -> float | None:
    """Kendall's tau-b between v and the given order, in [-1, 1]; None if all v or all ranks are equal.

    (concordant - discordant) / sqrt(pairs untied in v * pairs untied in rank); Kendall 1945.
    """
    total = untied_v = untied_rank = 0
    for i in range(len(v)):
        for j in range(i):
            by_v, by_rank = _sign(v[i] - v[j]), _sign(ranks[j] - ranks[i])
            total += by_v * by_rank
            untied_v += by_v != 0
            untied_rank += by_rank != 0
    if not untied_v or not untied_rank:
        return None
    return total / math.sqrt(untied_v * untied_rank)


def ndcg(v: Sequence[float], ranks: Sequence[int]) -> float:
    """Normalized discounted cumulative gain of the order by v. The gain is the distance in rank from the worst.

    Linear gain, discount log2(place + 1) (Jarvelin and Kekalainen 2002); responses with equal v share their discounts.
    """
    gains = [max(ranks) - rank for rank in ranks]
    discounts = [1 / math.log2(place + 2) for place in range(len(v))]
    dcg = 0.0
    for tied in _by_v(v):
        start = sum(v[k] > v[tied[0]] for k in range(len(v)))
        share = sum(discounts[start : start + len(tied)]) / len(tied)
        dcg += share * sum(gains[k] for k in tied)
    ideal = sum(gain * discount for gain, discount in zip(sorted(gains, reverse=True), discounts, strict=True))
    return dcg / ideal


def top1_hit(v: Sequence[float], ranks: Sequence[int]) -> float:
    """1 if the response with the highest v is a best one, else 0; with several of them, the share of best ones."""
    top = _by_v(v)[0]
    return sum(ranks[k] == 0 for k in top) / len(top)


def reciprocal_rank(v: Sequence[float], ranks: Sequence[int]) -> float:
    """1 / the place, by v, of the first of the best responses; responses with equal v share their mean place."""
    best = max(v[k] for k in range(len(v)) if ranks[k] == 0)
    above = sum(value > best for value in v)
    tied = sum(value == best for value in v)
    return 1 / (above + (tied + 1) / 2)


def _by_v(v: Sequence[float]) -> list[list[int]]:
    """Indices of the responses, grouped by equal v, the highest v first."""
    return [[k for k in range(len(v)) if v[k] == value] for value in sorted(set(v), reverse=True)]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
