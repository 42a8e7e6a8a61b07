"""Bootstrap confidence intervals. Prompts are resampled with replacement, not pairs: those of a prompt are dependent.

95 % percentile intervals (Efron and Tibshirani 1993, chapter 13), always from the same seed. Every task uses them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from tuna_peft.evaluation.results import Metric

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 4_000_000  # random numbers at a time: 32 MB


def mean_metric(scores: Sequence[float | None], weights: Sequence[float] | None = None) -> Metric:
    """The (weighted) mean over prompts with its interval; prompts without a score, or with weight 0, do not count.

    Args:
        scores: One for each prompt; None for a prompt without a score.
        weights: One for each prompt: a prompt with 6 pairs weighs 6 in the accuracy over pairs.
    """
    given = [1.0] * len(scores) if weights is None else weights
    pairs = [(score, weight) for score, weight in zip(scores, given, strict=True) if score is not None and weight]
    if not pairs:
        return Metric(None)
    values, counts = np.array(pairs, dtype=float).T
    value = float((values @ counts) / counts.sum())
    low, high = percentiles(_means(values, counts))
    return Metric(value, low, high, round(counts.sum()))


def paired_difference(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Metric:
    """The mean of `second` minus that of `first` on the same prompts, with its interval."""
    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    counts = np.asarray(weights, dtype=float)
    low, high = percentiles(_means(difference, counts))
    return Metric(float(difference @ counts / counts.sum()), low, high, len(counts))


def resamples(count: int) -> Iterator[np.ndarray]:
    """How often each prompt occurs in each resample: blocks `(resamples, count)`, `RESAMPLES` rows in all."""
    return iter(_kept_draws(count)) if count * RESAMPLES <= _AT_ONCE else _draws(count)


def _draws(count: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    block = max(1, _AT_ONCE // max(count, 1))
    for start in range(0, RESAMPLES, block):
        draws = min(block, RESAMPLES - start)
        yield generator.multinomial(count, np.full(count, 1 / count), size=draws)


@functools.lru_cache(maxsize=8)
def _kept_draws(count: int) -> list[np.ndarray]:
    """Shared by the metrics and stages of a task: drawing takes most of an interval's time. At most 8 MB."""
    return [drawn.astype(np.uint16) for drawn in _draws(count)]


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The ends of the interval that holds the middle `LEVEL` of `values`."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The weighted mean in each resample."""
    return np.concatenate([(drawn @ (values * counts)) / (drawn @ counts) for drawn in resamples(len(values))])
