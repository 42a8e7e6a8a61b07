"""Ranking metrics of training: summed on the device for each micro-batch, turned into means when they are logged.

`TunaTrainer` records and logs them. Shape suffixes: B prompts, N responses.
"""

from __future__ import annotations

from collections import defaultdict
from functools import reduce
from operator import add

import torch
from accelerate.utils import gather_object

from tuna_peft.training.ranks import distances


def pair_statistics(
    scores_BN: torch.Tensor, ranks_BN: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts of pairs without ties: in the right order; by at least `margin` per step in rank; all of them."""
    distance_BNN = distances(ranks_BN)
    # [b, i, j]: score of response i minus that of response j, where j is ranked below i.
    difference_BNN = scores_BN[:, :, None] - scores_BN[:, None, :]
    pairs_BNN = distance_BNN > 0
    right = ((difference_BNN > 0) & pairs_BNN).sum()
    satisfied = ((difference_BNN >= margin * distance_BNN) & pairs_BNN).sum()
    return right, satisfied, pairs_BNN.sum()


def add_ranking_metrics(means: RunningMeans, scores_BN: torch.Tensor, ranks_BN: torch.Tensor, margin: float) -> None:
    """Adds a micro-batch to `ranking_accuracy`, `margin_satisfaction` and the mean score of every rank."""
    right, satisfied, pairs = pair_statistics(scores_BN, ranks_BN, margin)
    means.add("ranking_accuracy", right, pairs)
    means.add("margin_satisfaction", satisfied, pairs)
    for rank in range(ranks_BN.shape[1]):
        has_rank_BN = ranks_BN == rank
        means.add(f"scores/rank_{rank}", torch.where(has_rank_BN, scores_BN, 0.0).sum(), has_rank_BN.sum())


class RunningMeans:
    """Sums and counts by name. No value leaves the device before `pop`, so recording does not wait for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        """Adds `total` over `count` items to the mean `name`."""
        self._sums[name].append((torch.as_tensor(total).detach(), torch.as_tensor(count)))

    def sums(self) -> dict[str, tuple[float, float]]:
        """`{name: (total, count)}` of this process."""
        # Added one by one: `sum` rounds less from Python 3.12 on, and then depends on where training was interrupted.
        return {
            name: (
                reduce(add, (float(total) for total, _ in pairs)),
                reduce(add, (float(count) for _, count in pairs)),
            )
            for name, pairs in self._sums.items()
        }

    def restore(self, sums: dict[str, tuple[float, float]]) -> None:
        """Puts back what `sums` returned, exactly."""
        self._sums.clear()
        for name, (total, count) in sums.items():
            self._sums[name].append(
                (torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
            )

    def copy(self) -> RunningMeans:
        """A copy to restore when a step is repeated."""
        other = RunningMeans()
        other._sums.update({name: list(entries) for name, entries in self._sums.items()})
        return other

    def pop(self, *, several_processes: bool = False) -> dict[str, float]:
        """`{name: mean}` over all processes; names without any item are left out. Resets the sums."""
        own = self.sums()
        self._sums.clear()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for sums in gather_object([own]) if several_processes else [own]:
            for name, (total, count) in sums.items():
                totals[name][0] += total
                totals[name][1] += count
        return {name: total / count for name, (total, count) in totals.items() if count}
