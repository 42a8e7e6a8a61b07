"""Packs each prompt and its responses into one sequence in which every shared token is computed once.

A prompt's N sequences (prompt + response) form a tree: a prefix that several of them share, first of all the prompt,
is one branch. A packed sequence holds the tree's tokens in the order in which the sequences add them, so
[prompt | r1 | ... | rN] when responses share nothing. Each token attends to the earlier tokens of its own response's
sequence, at the positions that it would have there, so every hidden state equals that of a separate sequence.

`TunaTrainer` uses `MicroBatchCollator`; the ranking evaluation and the teacher use `RankedCollator`. Shape suffixes:
see `tuna_peft.data.batch`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tuna_peft.data.batch import PackedBatch, segment_keys
from tuna_peft.data.encoder import loss_tokens
from tuna_peft.errors import UserError
from tuna_peft.limits import LONG_ROW, PAD_TO

# A limit beyond every position: the whole of a segment is visible.
EVERYTHING = 2**31 - 1


@dataclass
class RankedCollator:
    """Turns encoded rows (see `tuna_peft.data.tokenize.encode_ranked`) into a `PackedBatch`, one sequence per row.

    Args:
        pad_token_id: Fills `input_ids_BT` and is never read: padding is recognized by its segment, so it may be EOS.
        mle_on: Which responses the SFT loss (NLL) term covers: `all`, `best` or `reference`; the last one appends the
            reference response as one more, unranked.
        pad_to_multiple_of: Sequences are padded to a multiple of this.
        share_responses: Also share prefixes that responses have in common beyond the prompt.
    """

    pad_token_id: int
    mle_on: str = "all"
    pad_to_multiple_of: int = PAD_TO
    share_responses: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> PackedBatch:
        return self.stack([self.pack(row) for row in rows])

    def stack(self, packed: Sequence[PackedRow]) -> PackedBatch:
        """The batch of rows that are packed already."""
        width = max(len(tree.tokens) for tree in packed)
        width += -width % self.pad_to_multiple_of
        n = max(len(tree.ranks) for tree in packed)
        segments = max(len(tree.limits) for tree in packed) + 1

        def padded(columns: Sequence[list[Any]], size: int, fill: int) -> torch.Tensor:
            return torch.tensor([column + [fill] * (size - len(column)) for column in columns])

        limits_BSS = torch.zeros(len(packed), segments, segments, dtype=torch.int32)
        targets: list[int] = []
        predictors: list[int] = []
        predictions: list[int] = []
        responses: list[int] = []
        before = 0  # tokens of the sequences above, without padding
        for b, tree in enumerate(packed):
            for segment, seen in enumerate(tree.limits):
                for other, limit in seen.items():
                    limits_BSS[b, segment, other] = limit
            prediction_of: dict[int, int] = {}  # from a token of this tree to its place among the R predictions
            for k, tokens in enumerate(tree.loss_tokens):
                for token in tokens:
                    if token not in prediction_of:
                        prediction_of[token] = len(targets)
                        targets.append(tree.tokens[token])
                        predictors.append(before + tree.parents[token])
                    predictions.append(prediction_of[token])
                    responses.append(b * n + k)
            before += len(tree.tokens)
        position_ids_BT = padded([tree.positions for tree in packed], width, 0)
        segment_ids_BT = padded([tree.segments for tree in packed], width, segments - 1)
        return PackedBatch(
            input_ids_BT=padded([tree.tokens for tree in packed], width, self.pad_token_id),
            position_ids_BT=position_ids_BT,
            segment_ids_BT=segment_ids_BT,
            limits_BSS=limits_BSS,
            **segment_keys(segment_ids_BT, position_ids_BT, limits_BSS),
            predictors_R=torch.tensor(predictors),
            targets_R=torch.tensor(targets),
            predictions_P=torch.tensor(predictions),
            responses_P=torch.tensor(responses),
            ranks_BN=padded([tree.ranks for tree in packed], n, -1),
            mle_BN=padded([tree.mle for tree in packed], n, 0).bool(),
            grades_BN=padded([tree.grades for tree in packed], n, 0).float(),
            row_hashes_B=torch.tensor([tree.hash for tree in packed]),
        )

    def pack(self, row: dict[str, Any]) -> PackedRow:
        """One row's tokens as a tree."""
        gaps = row.get("completion_gaps") or [[]] * len(row["ranks"])
        responses = list(zip(row["completions_ids"], row["completion_skips"], gaps, row["ranks"], strict=True))
        if self.mle_on == "reference":
            gap = row.get("reference_gaps") or []
            responses.append((row["reference_ids"], row["reference_skip"], gap, -1))
        tree = PackedRow(grades=list(row.get("scores") or []), hash=_hash(row["prompt_ids"], responses))
        prompt = tree.add(row["prompt_ids"], share=True)
        for tokens, skip, gap, rank in responses:
            places = tree.add(tokens, after=prompt[-1], share=self.share_responses)
            tree.loss_tokens.append(loss_tokens(places, skip, gap))
            tree.ranks.append(rank)
            tree.mle.append(int(self.mle_on == "all" or rank == (0 if self.mle_on == "best" else -1)))
        return tree


@dataclass
class MicroBatchCollator:
    """Collates the prompts of one batch into one or more micro-batches, prompts of similar length together.

    The sampler chooses the prompts of a step, whatever their lengths, and the loss is averaged over all of them: the
    token budget changes memory and time, not the loss.

    Args:
        collate: Packs rows and stacks them into a `PackedBatch`.
        max_tokens: Maximum tokens of a micro-batch; None puts all prompts into one. Padding counts where there is any:
            sequences of `LONG_ROW` tokens and more are concatenated without it.
        by_segment: Whether the model computes such sequences without padding; eager attention does not.

    Returns (when called):
        `{"micro_batches": [PackedBatch, ...], "order": [int, ...]}`, the longest sequences first, so that running out
        of memory shows at once; `order` holds the row of each sequence. A dict, because `Trainer` looks up keys in a
        batch.
    """

    collate: RankedCollator
    max_tokens: int | None = None
    by_segment: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        packed = [self.collate.pack(row) for row in rows]
        order = list(range(len(rows)))
        if self.max_tokens is None:
            return {"micro_batches": [self.collate.stack(packed)], "order": order}
        order.sort(key=lambda index: -len(packed[index].tokens))
        micro_batches: list[list[PackedRow]] = []
        for row in (packed[index] for index in order):
            if not micro_batches or self._tokens([*micro_batches[-1], row]) > self.max_tokens:
                micro_batches.append([])
            micro_batches[-1].append(row)
        return {"micro_batches": [self.collate.stack(rows) for rows in micro_batches], "order": order}

    def _tokens(self, rows: list[PackedRow]) -> int:
        """Tokens of a micro-batch whose first row is the longest."""
        width = len(rows[0].tokens)
        if self.by_segment and width + -width % self.collate.pad_to_multiple_of >= LONG_ROW:
            return sum(len(row.tokens) for row in rows)
        return len(rows) * width

    def require_fitting(self, rows: Iterable[dict[str, Any]]) -> None:
        """Checks that every prompt fits into the budget with its responses.

        Raises:
            UserError: One does not; names the first.
        """
        if self.max_tokens is None:
            return
        for index, row in enumerate(rows):
            if total_length(row) <= self.max_tokens:
                continue  # it fits even without sharing: no need to build the tree
            tokens = len(self.collate.pack(row).tokens)
            if tokens > self.max_tokens:
                raise UserError(
                    f"a prompt with its responses has {tokens} tokens, max_tokens_per_batch is {self.max_tokens}",
                    where=f"row {index}" + (f" (id {row['id']})" if row.get("id") else ""),
                    fix=f"Raise max_tokens_per_batch to at least {tokens}, or lower max_length.",
                )


def _hash(prompt: Sequence[int], responses: Sequence[tuple[Any, ...]]) -> int:
    """64 bits over the tokens of a prompt and its responses, and over which of them carry loss."""
    content = json.dumps([prompt, [response[:-1] for response in responses]])  # the last entry is the rank
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big", signed=True)


def total_length(row: dict[str, Any]) -> int:
    """Tokens of an encoded row: its prompt and all its responses, before shared prefixes are merged."""
    return len(row["prompt_ids"]) + sum(map(len, row["completions_ids"]))


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
    grades: list[float] = field(default_factory=list)
    hash: int = 0
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], *, after: int = -1, share: bool) -> list[int]:
        """Adds a sequence behind the token `after`; returns the index of each of its tokens."""
        indices: list[int] = []
        parent, shared = after, share
        for token in tokens:
            index = self._children.get((parent, token)) if shared else None
            if index is None:
                index = len(self.tokens)
                if not indices or shared or not self.limits:  # the first token that is not shared
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
