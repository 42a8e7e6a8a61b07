"""Ranks of a prompt's responses: dense, with ties and missing responses, and the pairs that they form.

Shape suffixes: B prompts, N responses of a prompt, G = N - 1 differences in rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def dense_ranks(ranks_BN: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
    """Ranks 0, 1, 2... in the order of `ranks_BN`, equal where tied; -1 where the mask is False."""
    better_BNN = (ranks_BN[:, None, :] < ranks_BN[:, :, None]) & mask_BN[:, None, :]
    # Count distinct better ranks: of equal ones only the first counts.
    equal_BNN = (ranks_BN[:, None, :] == ranks_BN[:, :, None]) & mask_BN[:, None, :] & mask_BN[:, :, None]
    first_BN = ~equal_BNN.tril(-1).any(-1) & mask_BN
    dense_BN = (better_BNN & first_BN[:, None, :]).sum(-1)
    return dense_BN.masked_fill(~mask_BN, -1)


def distances(ranks_BN: torch.Tensor) -> torch.Tensor:
    """`(B, N, N)`: ranks of j minus i, and 0 where the two form no pair (tied, j better, or one is missing)."""
    present_BNN = (ranks_BN[:, :, None] >= 0) & (ranks_BN[:, None, :] >= 0)
    return (ranks_BN[:, None, :] - ranks_BN[:, :, None]).clamp_min(0).masked_fill(~present_BNN, 0)


@dataclass
class PairCounts:
    """The numbers of pairs and prompts that a loss is averaged over, in one micro-batch or in an optimizer step.

    Attributes:
        pairs_G: `(G,)` number of pairs by difference in rank, starting with 1.
        prompts: Scalar, number of prompts.
    """

    pairs_G: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def of(cls, ranks_BN: torch.Tensor) -> PairCounts:
        """Counts the pairs of dense ranks, see `dense_ranks`."""
        steps = max(ranks_BN.shape[1] - 1, 1)
        pairs = torch.bincount(distances(ranks_BN).flatten(), minlength=steps + 1)[1 : steps + 1]
        return cls(pairs, torch.tensor(len(ranks_BN), device=ranks_BN.device))
