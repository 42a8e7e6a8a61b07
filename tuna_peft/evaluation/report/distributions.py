"""How v, the length-normalised log-probability of a response, is distributed at each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tuna_peft.evaluation.results import TaskResult

_POINTS = 49
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def by_rank(rankings: Mapping[str, TaskResult]) -> dict[str, list[dict[str, Any]]]:
    """By stage, for each rank from the best: `rank`, `count`, `mean`, `quantiles` and `density`.

    Densities are Gaussian kernel estimates (Silverman's rule), all on one grid that holds the middle 98 % of every
    stage's values, so that the stages can be compared by eye; `density` lists pairs of v and density.
    """
    values = {stage: _values(result) for stage, result in rankings.items()}
    everything = [of_rank for ranks in values.values() for of_rank in ranks.values()]
    if not everything:
        return {}
    ends = [np.quantile(np.concatenate(list(ranks.values())), [0.01, 0.99]) for ranks in values.values() if ranks]
    grid = np.linspace(min(low for low, _ in ends), max(high for _, high in ends), _POINTS)
    return {
        stage: [
            {
                "rank": rank,
                "count": len(v),
                "mean": float(v.mean()),
                "quantiles": {f"{q:g}": float(np.quantile(v, q)) for q in _QUANTILES},
                "density": np.stack([grid.round(4), _density(v, grid).round(5)], axis=1).tolist(),
            }
            for rank, v in sorted(ranks.items())
        ]
        for stage, ranks in values.items()
    }


def _values(result: TaskResult) -> dict[int, np.ndarray]:
    found: dict[int, list[float]] = {}
    for prompt in result.prompts:
        for rank, v in zip(prompt.details["ranks"], prompt.details["v"], strict=True):
            found.setdefault(rank, []).append(v)
    return {rank: np.array(v) for rank, v in found.items()}


def _density(v: np.ndarray, grid: np.ndarray) -> np.ndarray:
    middle = np.subtract(*np.quantile(v, [0.75, 0.25])) / 1.34
    width = 0.9 * (min(v.std(), middle) or v.std()) * len(v) ** -0.2
    width = max(width, (grid[-1] - grid[0]) / 100, 1e-6)  # all values alike: a narrow peak, no division by zero
    kernels = np.exp(-0.5 * ((grid[:, None] - v[None, :]) / width) ** 2)
    return kernels.sum(axis=1) / (len(v) * width * np.sqrt(2 * np.pi))
