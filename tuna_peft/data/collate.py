"""Packs each prompt and its responses into one row: [prompt | response 1 | ... | response N].

The prompt is computed once for all of its responses; each response sees the prompt and itself, and its positions go on
after the prompt, so every hidden state is the one of a separate row.

Shape suffixes: B prompts, N responses, T tokens of a row, R predicted tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PROMPT_SEGMENT = 0
PADDING_SEGMENT = -1


@dataclass
class RankedCollator:
    """Turns encoded rows (see `tuna_peft.data.tokenize.encode_ranked`) into a batch.

    The batch holds:

    - `input_ids`, `position_ids`, `segment_ids` `(B, T)`; segments: 0 prompt, 1..N responses, -1 padding;
    - `predictors` `(R,)`: index into the flattened `(B * T)` positions of the token that predicts each target;
    - `targets` `(R,)`: the response tokens that carry loss;
    - `candidates` `(R,)`: index into the flattened `(B * N)` responses that each target belongs to;
    - `ranks` `(B, N)`: 0 is best, equal where tied, -1 where there is no ranked response;
    - `mle` `(B, N)`: which responses the likelihood term covers.

    Args:
        pad_token_id: Fills `input_ids`; never looked at, padding is known by its segment.
        mle_on: `all`, `best` or `reference`; the last one appends the reference response as one more, unranked.
        pad_to_multiple_of: Rows are padded to a multiple of this.
    """

    pad_token_id: int
    mle_on: str = "all"
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packed = [self._pack(row) for row in rows]
        width = max(len(row["input_ids"]) for row in packed)
        width += -width % self.pad_to_multiple_of
        n = max(len(row["ranks"]) for row in packed)

        def stack(key: str, size: int, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (size - len(row[key])) for row in packed])

        return {
            "input_ids": stack("input_ids", width, self.pad_token_id),
            "position_ids": stack("position_ids", width, 0),
            "segment_ids": stack("segment_ids", width, PADDING_SEGMENT),
            "predictors": torch.tensor([b * width + t for b, row in enumerate(packed) for t in row["predictors"]]),
            "targets": torch.tensor([token for row in packed for token in row["targets"]]),
            "candidates": torch.tensor([b * n + k for b, row in enumerate(packed) for k in row["candidates"]]),
            "ranks": stack("ranks", n, -1),
            "mle": stack("mle", n, 0).bool(),
        }

    def _pack(self, row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = list(row["prompt_ids"])
        responses = list(zip(row["completions_ids"], row["completion_skips"], row["ranks"], strict=True))
        if self.mle_on == "reference":
            responses.append((row["reference_ids"], row["reference_skip"], -1))
        packed: dict[str, list[int]] = {
            "input_ids": list(prompt),
            "position_ids": list(range(len(prompt))),
            "segment_ids": [PROMPT_SEGMENT] * len(prompt),
            "predictors": [], "targets": [], "candidates": [], "ranks": [], "mle": [],
        }  # fmt: skip
        for k, (tokens, skip, rank) in enumerate(responses):
            start = len(packed["input_ids"])
            packed["input_ids"] += tokens
            packed["position_ids"] += range(len(prompt), len(prompt) + len(tokens))
            packed["segment_ids"] += [k + 1] * len(tokens)
            for t in range(skip, len(tokens)):
                # The last prompt token predicts the first token of every response.
                packed["predictors"].append(start + t - 1 if t else len(prompt) - 1)
                packed["targets"].append(tokens[t])
                packed["candidates"].append(k)
            packed["ranks"].append(rank)
            packed["mle"].append(int(self.mle_on == "all" or rank == (0 if self.mle_on == "best" else -1)))
        return packed
