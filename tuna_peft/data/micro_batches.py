"""Splits the prompts of a step into forward passes by their tokens instead of their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuna_peft.data.collate import PackedRow, RankedCollator, segment_keys
from tuna_peft.errors import UserError


@dataclass
class MicroBatchCollator:
    """Collates the prompts that the sampler drew into one or more micro-batches, like lengths together.

    Which prompts make up a step is the sampler's choice and depends on no length; the loss is averaged over all of
    them, so that the budget changes memory and time and nothing else.

    Args:
        collate: Makes a batch of packed rows.
        max_tokens: Most tokens of a micro-batch, padding included; None puts all prompts into one.

    Returns (when called):
        `{"micro_batches": [...]}`, the longest rows first: what does not fit into memory fails at once.
    """

    collate: RankedCollator
    max_tokens: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, torch.Tensor]]]:
        packed = [self.collate.pack(row) for row in rows]
        if self.max_tokens is None:
            return {"micro_batches": [self.collate.stack(packed)]}
        packed.sort(key=lambda row: -len(row.tokens))
        micro_batches: list[list[PackedRow]] = []
        for row in packed:
            width = len(micro_batches[-1][0].tokens) if micro_batches else 0
            if not micro_batches or (len(micro_batches[-1]) + 1) * width > self.max_tokens:
                micro_batches.append([])
            micro_batches[-1].append(row)
        return {"micro_batches": [self.collate.stack(rows) for rows in micro_batches]}

    def require_fitting(self, rows: Iterable[dict[str, Any]]) -> None:
        """Checks that every prompt with its responses is within the budget.

        Raises:
            UserError: The first one that is not.
        """
        if self.max_tokens is None:
            return
        for index, row in enumerate(rows):
            if len(row["prompt_ids"]) + sum(map(len, row["completions_ids"])) <= self.max_tokens:
                continue  # before anything is shared: no need to build the tree
            tokens = len(self.collate.pack(row).tokens)
            if tokens > self.max_tokens:
                raise UserError(
                    f"a prompt with its responses has {tokens} tokens, max_tokens_per_batch is {self.max_tokens}",
                    where=f"row {index}" + (f" (id {row['id']})" if row.get("id") else ""),
                    fix=f"Raise max_tokens_per_batch to at least {tokens}, or lower max_length.",
                )


def halves(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A collated batch as two with half of the prompts each, or as it is when it holds one."""
    (b, n), width = batch["ranks"].shape, batch["input_ids"].shape[1]
    if b == 1:
        return [batch]
    parts = []
    for first, last in ((0, b // 2), (b // 2, b)):
        of_part = (batch["candidates"] >= first * n) & (batch["candidates"] < last * n)
        # Responses that share tokens share predictions too; each is kept once, in its order.
        predictions, path = batch["path"][of_part].unique(return_inverse=True)
        part = {key: batch[key][first:last] for key in _BY_ROW}
        keys = segment_keys(part["segment_ids"], part["position_ids"], part["limits"])
        part |= {key: value.to(predictions.device) for key, value in keys.items()}
        part["predictors"] = batch["predictors"][predictions] - (batch["tokens"] < first * width).sum()
        part["targets"] = batch["targets"][predictions]
        part["path"] = path
        part["candidates"] = batch["candidates"][of_part] - first * n
        parts.append(part)
    return parts


_BY_ROW = ("input_ids", "position_ids", "segment_ids", "limits", "ranks", "mle")
