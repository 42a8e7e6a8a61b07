"""Packed rows and their mask, against matrices written by hand."""

import torch

from tuna_peft.data.collate import RankedCollator
from tuna_peft.training.prefix import shared_prefix_mask

ROW = {
    "prompt_ids": [1, 5],
    "completions_ids": [[6, 7, 2], [8, 2]],
    "completion_skips": [0, 0],
    "ranks": [0, 1],
    "reference_ids": [9, 2],
    "reference_skip": 0,
}
SHORT = {**ROW, "prompt_ids": [1], "completions_ids": [[5, 6, 2], [5, 2]], "completion_skips": [1, 1]}


def test_one_row():
    batch = RankedCollator(pad_token_id=0, pad_to_multiple_of=1)([ROW])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2, 8, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert batch["predictors"].tolist() == [1, 2, 3, 1, 5]
    assert batch["targets"].tolist() == [6, 7, 2, 8, 2]
    assert batch["candidates"].tolist() == [0, 0, 0, 1, 1]
    assert batch["ranks"].tolist() == [[0, 1]]
    assert batch["mle"].tolist() == [[True, True]]


def test_padding_skips_and_fewer_responses():
    one = {**SHORT, "completions_ids": [[5, 6, 2]], "completion_skips": [1], "ranks": [0]}
    batch = RankedCollator(pad_token_id=0, pad_to_multiple_of=8)([ROW, one])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["segment_ids"][1].tolist() == [0, 1, 1, 1, -1, -1, -1, -1]
    # The skipped token 5 belongs to the prompt's text: it predicts, and is not predicted.
    assert batch["predictors"][5:].tolist() == [8 + 1, 8 + 2]
    assert batch["targets"][5:].tolist() == [6, 2]
    assert batch["candidates"][5:].tolist() == [2, 2]
    assert batch["ranks"].tolist() == [[0, 1], [0, -1]]
    assert batch["mle"].tolist() == [[True, True], [True, False]]


def test_likelihood_on_best_and_on_the_reference():
    assert RankedCollator(0, mle_on="best")([ROW])["mle"].tolist() == [[True, False]]
    batch = RankedCollator(0, mle_on="reference", pad_to_multiple_of=1)([ROW])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2, 8, 2, 9, 2]]
    assert batch["ranks"].tolist() == [[0, 1, -1]]
    assert batch["mle"].tolist() == [[False, False, True]]


def test_mask():
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    assert shared_prefix_mask(segments, positions)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert shared_prefix_mask(segments, positions, window=2)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
