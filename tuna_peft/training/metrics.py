"""Ranking metrics of training, summed on the device and turned into means when they are logged.

Shape suffixes: B prompts, N responses.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from tuna_peft.training.loss import distances


def pair_statistics(
    scores_BN: torch.Tensor, ranks_BN: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many untied pairs are in the right order, how many by at least their margin, and how many there are."""
    distance_BNN = distances(ranks_BN)
    lead_BNN = scores_BN[:, :, None] - scores_BN[:, None, :]
    pairs_BNN = distance_BNN > 0
    right = ((lead_BNN > 0) & pairs_BNN).sum()
    satisfied = ((lead_BNN >= margin * distance_BNN) & pairs_BNN).sum()
    return right, satisfied, pairs_BNN.sum()


class RunningMeans:
    """Numerators and denominators by name; nothing leaves the device before `pop`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        """Adds `total` over `count` items to the mean `name`."""
        self._sums[name].append((torch.as_tensor(total).detach(), torch.as_tensor(count)))

    def copy(self) -> RunningMeans:
        """The same sums, to come back to."""
        other = RunningMeans()
        other._sums.update({name: list(entries) for name, entries in self._sums.items()})
        return other

    def pop(self) -> dict[str, tuple[float, float]]:
        """`{name: (total, count)}`, and starts anew."""
        sums = {
            name: (sum(float(total) for total, _ in pairs), sum(float(count) for _, count in pairs))
            for name, pairs in self._sums.items()
        }
        self._sums.clear()
        return sums
