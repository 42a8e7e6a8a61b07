"""How likely the model finds the responses of each rank, compared with the others to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tuna_peft.evaluation.results import TaskResult

_POINTS = 49
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def by_rank(rankings: Mapping[str, TaskResult]) -> dict[str, list[dict[str, Any]]]:
    """By stage, for each rank from the best: `rank`, `count`, `mean_v`, and `quantiles` and `density` of its lead.

    The lead of a response is its v (length-normalised log-probability) minus the mean v of all responses to the same
    prompt: how easy a prompt is would hide the order. Densities are Gaussian kernel estimates (Silverman's rule), all
    on one grid that holds the middle 98 % of every stage, so that the stages can be compared by eye; `density` lists
    pairs of lead and density.
    """
    found = {stage: _v_and_lead(result) for stage, result in rankings.items()}
    leads = [np.concatenate([lead for _, lead in ranks.values()]) for ranks in found.values() if ranks]
    if not leads:
        return {}
    ends = np.array([np.quantile(lead, [0.01, 0.99]) for lead in leads])
    grid = np.linspace(ends[:, 0].min(), ends[:, 1].max(), _POINTS)
    return {
        stage: [
            {
                "rank": rank,
                "count": len(v),
                "mean_v": float(v.mean()),
                "quantiles": {f"{q:g}": float(np.quantile(lead, q)) for q in _QUANTILES},
                "density": np.stack([grid.round(4), _density(lead, grid).round(5)], axis=1).tolist(),
            }
            for rank, (v, lead) in sorted(ranks.items())
        ]
        for stage, ranks in found.items()
    }


def _v_and_lead(result: TaskResult) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By rank, of every response."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for prompt in result.prompts:
        mean = sum(prompt.details["v"]) / len(prompt.details["v"])
        for rank, v in zip(prompt.details["ranks"], prompt.details["v"], strict=True):
            pairs.setdefault(rank, []).append((v, v - mean))
    return {rank: tuple(np.array(of_rank).T) for rank, of_rank in pairs.items()}


def _density(lead: np.ndarray, grid: np.ndarray) -> np.ndarray:
    middle = np.subtract(*np.quantile(lead, [0.75, 0.25])) / 1.34
    width = 0.9 * (min(lead.std(), middle) or lead.std()) * len(lead) ** -0.2
    width = max(width, (grid[-1] - grid[0]) / 100, 1e-6)  # all values alike: a narrow peak, no division by zero
    kernels = np.exp(-0.5 * ((grid[:, None] - lead[None, :]) / width) ** 2)
    return kernels.sum(axis=1) / (len(lead) * width * np.sqrt(2 * np.pi))
