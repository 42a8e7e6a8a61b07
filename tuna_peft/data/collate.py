"""Packs each prompt and its responses into one row that computes every shared token once.

A prompt's N sequences (prompt + response) form a tree: what several of them begin with, the prompt above all, is one
branch. A row holds the tree's tokens in the order in which the sequences add them, so [prompt | r1 | ... | rN] when
responses share nothing. Each token sees the tokens of its own sequence before it, at the positions that it would have
in a separate row, so that every hidden state is that of a separate row.

Shape suffixes: B prompts, N responses, T tokens of a row, S segments of a row; U tokens without padding, R predicted
tokens and P path entries of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tuna_peft.limits import PAD_TO

# A limit beyond every position: the whole of a segment is visible.
EVERYTHING = 2**31 - 1


@dataclass
class RankedCollator:
    """Turns encoded rows (see `tuna_peft.data.tokenize.encode_ranked`) into a batch.

    The batch holds:

    - `input_ids`, `position_ids`, `segment_ids` `(B, T)`: the tree's tokens, their depth, and the unbranched run of
      tokens that each belongs to (padding is a last segment of its own);
    - `limits` `(B, S, S)`: a token of segment a sees those tokens of segment b whose position is below `limits[a, b]`;
    - `tokens` `(U,)`: where the tokens that are no padding are in the flattened `(B * T)` ones;
    - `q_offsets`, `k_offsets` int32, `keys`: what `limits` says, by segment, see `segment_keys`;
    - `predictors`, `targets` `(R,)`: each token that carries loss, once, and the index into `tokens` of the one before
      it;
    - `path`, `candidates` `(P,)`: which of those R tokens make up which response, as an index into the flattened
      `(B * N)` responses;
    - `ranks` `(B, N)`: 0 is best, equal where tied, -1 where there is no ranked response;
    - `mle` `(B, N)`: which responses the likelihood term covers.

    Args:
        pad_token_id: Fills `input_ids`; never looked at, padding is known by its segment.
        mle_on: `all`, `best` or `reference`; the last one appends the reference response as one more, unranked.
        pad_to_multiple_of: Rows are padded to a multiple of this.
        share_responses: Share what responses have in common beyond the prompt.
    """

    pad_token_id: int
    mle_on: str = "all"
    pad_to_multiple_of: int = PAD_TO
    share_responses: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.stack([self.pack(row) for row in rows])

    def stack(self, packed: Sequence[PackedRow]) -> dict[str, torch.Tensor]:
        """The batch of rows that are packed already."""
        width = max(len(tree.tokens) for tree in packed)
        width += -width % self.pad_to_multiple_of
        n = max(len(tree.ranks) for tree in packed)
        segments = max(len(tree.limits) for tree in packed) + 1

        def padded(columns: list[list[int]], size: int, fill: int) -> torch.Tensor:
            return torch.tensor([column + [fill] * (size - len(column)) for column in columns])

        limits = torch.zeros(len(packed), segments, segments, dtype=torch.int32)
        targets: list[int] = []
        predictors: list[int] = []
        path: list[int] = []
        candidates: list[int] = []
        before = 0  # tokens of the rows above
        for b, tree in enumerate(packed):
            for segment, seen in enumerate(tree.limits):
                for other, limit in seen.items():
                    limits[b, segment, other] = limit
            numbers: dict[int, int] = {}  # of a token in this row, among the R of the batch
            for k, tokens in enumerate(tree.loss_tokens):
                for token in tokens:
                    if token not in numbers:
                        numbers[token] = len(targets)
                        targets.append(tree.tokens[token])
                        predictors.append(before + tree.parents[token])
                    path.append(numbers[token])
                    candidates.append(b * n + k)
            before += len(tree.tokens)
        position_ids = padded([tree.positions for tree in packed], width, 0)
        segment_ids = padded([tree.segments for tree in packed], width, segments - 1)
        return {
            "input_ids": padded([tree.tokens for tree in packed], width, self.pad_token_id),
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "limits": limits,
            **segment_keys(segment_ids, position_ids, limits),
            "predictors": torch.tensor(predictors),
            "targets": torch.tensor(targets),
            "path": torch.tensor(path),
            "candidates": torch.tensor(candidates),
            "ranks": padded([tree.ranks for tree in packed], n, -1),
            "mle": padded([tree.mle for tree in packed], n, 0).bool(),
        }

    def pack(self, row: dict[str, Any]) -> PackedRow:
        """One row's tokens as a tree."""
        responses = list(zip(row["completions_ids"], row["completion_skips"], row["ranks"], strict=True))
        if self.mle_on == "reference":
            responses.append((row["reference_ids"], row["reference_skip"], -1))
        tree = PackedRow()
        prompt = tree.add(row["prompt_ids"], share=True)
        for tokens, skip, rank in responses:
            tree.loss_tokens.append(tree.add(tokens, after=prompt[-1], share=self.share_responses)[skip:])
            tree.ranks.append(rank)
            tree.mle.append(int(self.mle_on == "all" or rank == (0 if self.mle_on == "best" else -1)))
        return tree


def segment_keys(
    segment_ids: torch.Tensor, position_ids: torch.Tensor, limits: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Which keys each segment of a batch sees, for attention that goes segment by segment and computes no padding.

    Args:
        segment_ids, position_ids, limits: As in a batch of `RankedCollator`.

    Returns:
        `tokens` `(U,)`: where the tokens that are no padding are in the flattened `(B * T)` ones; `q_offsets`,
        `k_offsets` `(S+1,)` int32: where each of the batch's S segments starts among those U, and its keys among all
        K; `keys` `(K,)`: their places among the U, in the order of their positions and the segment itself last.
    """
    there = segment_ids < limits.shape[1] - 1
    q_offsets, k_offsets = [0], [0]
    keys: list[int] = []
    columns = there.sum(1).tolist(), segment_ids.tolist(), position_ids.tolist(), limits.tolist()
    for length, ids, positions, seen in zip(*columns, strict=True):
        row = q_offsets[-1]
        starts = [token for token in range(length) if token == 0 or ids[token] != ids[token - 1]]
        start_of = {ids[start]: start for start in starts}
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            own = ids[start]
            for other, limit in enumerate(seen[own]):  # ancestors were added before their branches
                if limit and other != own:
                    first = start_of[other]
                    keys += range(row + first, row + first + limit - positions[first])
            keys += range(row + start, row + end)
            q_offsets.append(row + end)
            k_offsets.append(len(keys))
    return {
        "tokens": there.flatten().nonzero().squeeze(-1),
        "q_offsets": torch.tensor(q_offsets, dtype=torch.int32),
        "k_offsets": torch.tensor(k_offsets, dtype=torch.int32),
        "keys": torch.tensor(keys),
    }


@dataclass
class PackedRow:
    """The tree of one prompt and its responses: tokens by index, with the index of the one before each (or -1)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    limits: list[dict[int, int]] = field(default_factory=list)
    loss_tokens: list[list[int]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    mle: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], *, after: int = -1, share: bool) -> list[int]:
        """Adds a sequence behind the token `after`; returns the index of each of its tokens."""
        indices: list[int] = []
        parent, shared = after, share
        for token in tokens:
            index = self._children.get((parent, token)) if shared else None
            if index is None:
                index = len(self.tokens)
                if not indices or shared or not self.limits:  # the first token off the beaten path
                    self._branch_off(parent)
                shared = False
                self.tokens.append(token)
                self.parents.append(parent)
                self.positions.append(self.positions[parent] + 1 if parent >= 0 else 0)
                self.segments.append(len(self.limits) - 1)
                self._children.setdefault((parent, token), index)
            indices.append(index)
            parent = index
        return indices

    def _branch_off(self, parent: int) -> None:
        """A new segment, which sees what `parent` sees, and of its segment the tokens up to it."""
        seen: dict[int, int] = {}
        if parent >= 0:
            home = self.segments[parent]
            seen = {**self.limits[home], home: self.positions[parent] + 1}
        self.limits.append({**seen, len(self.limits): EVERYTHING})
