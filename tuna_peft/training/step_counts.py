"""What the loss of an optimizer step is averaged over: counted from its batches before the first forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from accelerate.utils import gather_object

from tuna_peft.data.batch import PackedBatch
from tuna_peft.training.ranks import PairCounts


@dataclass
class StepCounts:
    """The denominators of one optimizer step's loss, over all its micro-batches and processes.

    Attributes:
        pairs: Number of pairs by difference in rank; index 0 holds a difference of 1.
        prompts: Number of prompts.
        mle_tokens: Number of response tokens in the SFT loss (NLL) term.
        tokens: Number of all tokens without padding, for reports.
    """

    pairs: list[int]
    prompts: int
    mle_tokens: int
    tokens: int

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], *, several_processes: bool = False) -> StepCounts:
        """The counts of these micro-batches, summed over processes."""
        own = [_of_micro_batch(batch) for batch in batches]
        # Python objects, not tensors: processes differ in the number of micro-batches and of distances in rank.
        counts = gather_object(own) if several_processes else own
        return cls(
            pairs=[sum(pairs) for pairs in zip_longest(*(pairs for pairs, *_ in counts), fillvalue=0)],
            prompts=sum(prompts for _, prompts, _, _ in counts),
            mle_tokens=sum(mle_tokens for _, _, mle_tokens, _ in counts),
            tokens=sum(tokens for *_, tokens in counts),
        )

    def pair_counts(self, device: torch.device) -> PairCounts:
        """Pairs and prompts, for `RankingLoss`."""
        return PairCounts(torch.tensor(self.pairs, device=device), torch.tensor(self.prompts, device=device))


def _of_micro_batch(batch: PackedBatch) -> tuple[list[int], int, int, int]:
    """Pairs by difference in rank, prompts, tokens of the SFT loss (NLL) term, and all tokens."""
    counts = PairCounts.of(batch.ranks_BN)
    mle_tokens = batch.mle_BN.flatten()[batch.responses_P].sum()
    return counts.pairs_G.tolist(), int(counts.prompts), int(mle_tokens), len(batch.tokens_U)
