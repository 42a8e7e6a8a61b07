"""How likely the model finds the responses of each rank, relative to the prompt's other ones. `build` calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tuna_peft.evaluation.results import TaskResult

_POINTS = 49
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def by_rank(rankings: Mapping[str, TaskResult]) -> dict[str, list[dict[str, Any]]]:
    """By stage, for each rank from the best: `rank`, `count`, `mean_v`, and `quantiles` and `density` of centered v.

    Centered v is v (length-normalized log-probability) minus the mean v of all responses to the same prompt; without
    centering, differences between easy and hard prompts would hide the order. Densities are Gaussian kernel estimates
    (Silverman's rule) on one grid that covers the middle 98 % of every stage, so that stages can be compared by eye;
    `density` lists pairs of centered v and density.
    """
    found = {stage: _v_and_centered(result) for stage, result in rankings.items()}
    all_centered = [np.concatenate([centered for _, centered in ranks.values()]) for ranks in found.values() if ranks]
    if not all_centered:
        return {}
    ends = np.array([np.quantile(centered, [0.01, 0.99]) for centered in all_centered])
    grid = np.linspace(ends[:, 0].min(), ends[:, 1].max(), _POINTS)
    return {
        stage: [
            {
                "rank": rank,
                "count": len(v),
                "mean_v": float(v.mean()),
                "quantiles": {f"{q:g}": float(np.quantile(centered, q)) for q in _QUANTILES},
                "density": np.stack([grid.round(4), _density(centered, grid).round(5)], axis=1).tolist(),
            }
            for rank, (v, centered) in sorted(ranks.items())
        ]
        for stage, ranks in found.items()
    }


def _v_and_centered(result: TaskResult) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """v and centered v of all responses, by rank."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for prompt in result.prompts:
        mean = sum(prompt.details["v"]) / len(prompt.details["v"])
        for rank, v in zip(prompt.details["ranks"], prompt.details["v"], strict=True):
            pairs.setdefault(rank, []).append((v, v - mean))
    return {rank: tuple(np.array(of_rank).T) for rank, of_rank in pairs.items()}


def _density(centered: np.ndarray, grid: np.ndarray) -> np.ndarray:
    middle = np.subtract(*np.quantile(centered, [0.75, 0.25])) / 1.34
    width = 0.9 * (min(centered.std(), middle) or centered.std()) * len(centered) ** -0.2
    width = max(width, (grid[-1] - grid[0]) / 100, 1e-6)  # equal values give a narrow peak, not a division by zero
    kernels = np.exp(-0.5 * ((grid[:, None] - centered[None, :]) / width) ** 2)
    return kernels.sum(axis=1) / (len(centered) * width * np.sqrt(2 * np.pi))
