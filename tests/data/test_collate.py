"""Packed sequences and their mask, against matrices written by hand."""

import torch
from families import make_rows

from tuna_peft.data.collate import MicroBatchCollator, RankedCollator
from tuna_peft.limits import LONG_ROW
from tuna_peft.models.forward.prefix import shared_prefix_mask

ROW = {
    "prompt_ids": [1, 5],
    "completions_ids": [[6, 7, 2], [8, 2]],
    "completion_skips": [0, 0],
    "ranks": [0, 1],
    "reference_ids": [9, 2],
    "reference_skip": 0,
}
# Responses with common prefixes; the second is a prefix of the first, apart from EOS.
ALIKE = {
    "prompt_ids": [1],
    "completions_ids": [[5, 6, 7, 2], [5, 6, 2], [5, 8, 2]],
    "completion_skips": [1, 1, 1],
    "ranks": [0, 1, 2],
    "reference_ids": [5, 6, 2],
    "reference_skip": 1,
}


def collate(*rows, **settings):
    return RankedCollator(**{"pad_token_id": 0, "pad_to_multiple_of": 1, **settings})(rows)


def mask(batch, window=None):
    return shared_prefix_mask(batch.segment_ids_BT, batch.position_ids_BT, batch.limits_BSS, window)[:, 0].int()


def test_one_row():
    batch = collate(ROW)
    assert batch.input_ids_BT.tolist() == [[1, 5, 6, 7, 2, 8, 2]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.segment_ids_BT.tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert batch.predictors_R.tolist() == [1, 2, 3, 1, 5]
    assert batch.targets_R.tolist() == [6, 7, 2, 8, 2]
    assert batch.predictions_P.tolist() == [0, 1, 2, 3, 4]
    assert batch.responses_P.tolist() == [0, 0, 0, 1, 1]
    assert batch.ranks_BN.tolist() == [[0, 1]]
    assert batch.mle_BN.tolist() == [[True, True]]
    assert mask(batch)[0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    assert mask(batch, window=2)[0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_responses_that_begin_alike_share_their_tokens():
    batch = collate(ALIKE)
    assert batch.input_ids_BT.tolist() == [[1, 5, 6, 7, 2, 2, 8, 2]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 3, 2, 3]]
    assert batch.segment_ids_BT.tolist() == [[0, 1, 1, 1, 1, 2, 3, 3]]
    # 5 is skipped: it belongs to the prompt's text. 6 is predicted once, and is part of two responses.
    assert batch.targets_R.tolist() == [6, 7, 2, 2, 8, 2]
    assert batch.predictors_R.tolist() == [1, 2, 3, 2, 1, 6]
    assert batch.predictions_P.tolist() == [0, 1, 2, 0, 3, 4, 5]
    assert batch.responses_P.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert mask(batch)[0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_a_reference_that_is_one_of_the_responses_costs_nothing():
    batch = collate(ALIKE, mle_on="reference")
    assert len(batch.tokens_U) == 8
    assert batch.responses_P.tolist()[-2:] == [3, 3] and batch.predictions_P.tolist()[-2:] == [0, 3]


def test_padding_and_fewer_responses():
    one = {**ROW, "prompt_ids": [1], "completions_ids": [[5, 6, 2]], "completion_skips": [1], "ranks": [0]}
    batch = collate(ROW, one, pad_to_multiple_of=8)
    assert batch.input_ids_BT.shape == (2, 8)
    assert batch.segment_ids_BT[1].tolist() == [0, 1, 1, 1, 3, 3, 3, 3]
    assert batch.tokens_U.tolist() == [*range(7), *range(8, 8 + 4)]
    assert batch.predictors_R[5:].tolist() == [7 + 1, 7 + 2]
    assert batch.targets_R[5:].tolist() == [6, 2]
    assert batch.responses_P[5:].tolist() == [2, 2]
    assert batch.ranks_BN.tolist() == [[0, 1], [0, -1]]
    assert batch.mle_BN.tolist() == [[True, True], [True, False]]
    assert mask(batch)[1, 4:].tolist() == torch.eye(8)[4:].int().tolist()


def test_likelihood_on_best_and_on_the_reference():
    assert collate(ROW, mle_on="best").mle_BN.tolist() == [[True, False]]
    batch = collate(ROW, mle_on="reference")
    assert batch.input_ids_BT.tolist() == [[1, 5, 6, 7, 2, 8, 2, 9, 2]]
    assert batch.ranks_BN.tolist() == [[0, 1, -1]]
    assert batch.mle_BN.tolist() == [[False, False, True]]


def test_mask_is_the_one_of_each_token_s_own_sequence():
    """Computed without segments: q attends to k when k is on the path from the root to q."""
    rows = make_rows(6, vocabulary=5, n=(4, 6))  # few tokens: deep sharing
    batch = collate(*rows)
    for b, row in enumerate(rows):
        sequences = [tuple(row["prompt_ids"] + response) for response in row["completions_ids"]]
        prefixes = {sequence[:depth] for sequence in sequences for depth in range(1, len(sequence) + 1)}
        assert len(collate(row).tokens_U) == len(prefixes)
        seen = mask(batch)[b]
        ids, positions = batch.input_ids_BT[b], batch.position_ids_BT[b]
        found = set()
        for q in range(len(prefixes)):
            keys = seen[q].nonzero().flatten()
            keys = keys[positions[keys].argsort()]
            assert positions[keys].tolist() == list(range(int(positions[q]) + 1))
            found.add(tuple(ids[keys].tolist()))
        assert found == prefixes


def test_a_token_budget_counts_padding_only_where_there_is_any():
    def row(length):
        return {"prompt_ids": [1], "completions_ids": [[5] * length, [6]], "completion_skips": [0, 0], "ranks": [0, 1]}

    def passes(longest, max_tokens, **settings):
        micro = MicroBatchCollator(RankedCollator(0), max_tokens, **settings)
        batches = micro([row(longest), row(100), row(100), row(100)])["micro_batches"]
        return [len(batch.ranks_BN) for batch in batches]

    long, short = LONG_ROW, LONG_ROW - 10
    assert passes(long, long + 2 + 3 * 102) == [4]  # concatenated without padding
    assert passes(long, long + 1 + 3 * 102) == [3, 1]
    assert passes(long, 4 * (long + 2) - 1, by_segment=False) == [3, 1]  # eager attention pads
    assert passes(short, 4 * (short + 2)) == [4] and passes(short, 4 * (short + 2) - 1) == [3, 1]


def test_forward_passes_fill_the_budget_exactly():
    row = {
        "prompt_ids": [5, 6],
        "completions_ids": [[7, 8, 1], [9, 1, 1]],
        "completion_skips": [0, 0],
        "ranks": [0, 1],
    }
    for budget, sizes in ((16, [2, 2]), (15, [1, 1, 1, 1]), (24, [3, 1]), (None, [4])):
        batches = MicroBatchCollator(RankedCollator(0), budget)([row] * 4)["micro_batches"]
        assert [len(batch.ranks_BN) for batch in batches] == sizes  # 8 tokens each
