"""Ranking accuracy: does the model find the better of two responses more likely?"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.scoring import response_logps
from tuna_peft.training.metrics import pair_statistics


@torch.no_grad()
def ranking_accuracy(
    model: torch.nn.Module,
    rows: Dataset,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    length_penalty: float = 1.0,
    description: str = "ranking",
) -> dict[str, Any]:
    """The share of untied pairs whose length-normalised log-probabilities are in the right order.

    Args:
        model: Any causal LM, with or without adapters.
        rows: Encoded ranked rows, see `tuna_peft.data.tokenize.encode_dataset`.
        length_penalty: Scores are summed log-probabilities over length to this power.

    Returns:
        `ranking_accuracy` and the `ranking_pairs` it is counted over.
    """
    model.eval()
    device = next(model.parameters()).device
    collate = RankedCollator(pad_token_id)
    # Rows of like length share a batch: less padding, the same numbers.
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i]["completions_ids"])))
    right = pairs = 0
    for start in tqdm(range(0, len(order), batch_size), desc=description, leave=False):
        batch = collate([rows[i] for i in order[start : start + batch_size]])
        batch = {key: value.to(device) for key, value in batch.items()}
        scores_BN = response_logps(model, batch).normalised(length_penalty)
        in_order, _, counted = pair_statistics(scores_BN, batch["ranks"], margin=0.0)
        right, pairs = right + int(in_order), pairs + int(counted)
    return {"ranking_accuracy": right / pairs, "ranking_pairs": pairs}
