"""`PackedBatch` is moved and pinned as a whole by the data loaders of PyTorch and accelerate, and by `TunaTrainer`."""

import pytest
import torch
from accelerate.utils import send_to_device
from families import make_rows
from torch.utils.data._utils.pin_memory import pin_memory

from tuna_peft.data.batch import PackedBatch
from tuna_peft.data.collate import MicroBatchCollator, RankedCollator


@pytest.fixture
def batch():
    return RankedCollator(pad_token_id=0)(make_rows(3))


def test_accelerate_moves_every_tensor(batch):
    [moved] = send_to_device({"micro_batches": [batch]}, torch.device("meta"), non_blocking=True)["micro_batches"]
    assert isinstance(moved, PackedBatch) and len(vars(moved)) == 16
    for name, tensor in vars(moved).items():
        assert tensor.device.type == "meta"
        assert (tensor.shape, tensor.dtype) == (getattr(batch, name).shape, getattr(batch, name).dtype)
    assert batch.ranks_BN.device.type == "cpu"


def test_pytorch_pins_every_tensor(batch, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    [found] = pin_memory({"micro_batches": [batch]})["micro_batches"]
    assert isinstance(found, PackedBatch)
    assert pinned == [tensor.data_ptr() for tensor in vars(batch).values()]


def test_shapes_are_those_of_the_docstring(batch):
    """Each suffix stands for one size, in every tensor that has it."""
    sizes = {}
    for name, tensor in vars(batch).items():
        if not name.endswith("_offsets"):
            for letter, size in zip(name.rpartition("_")[2], tensor.shape, strict=True):
                assert sizes.setdefault(letter, size) == size, name
    assert set(sizes) == set("BNTSUKRP")
    assert batch.q_offsets[-1] == sizes["U"] and batch.k_offsets[-1] == sizes["K"]


def responses(batch):
    """For each response, the pairs of a predicting token and the token that it predicts."""
    predicting = batch.input_ids_BT.flatten()[batch.tokens_U[batch.predictors_R]]
    found = [[] for _ in range(batch.ranks_BN.numel())]
    for place, response in zip(batch.predictions_P.tolist(), batch.responses_P.tolist(), strict=True):
        found[response].append((int(predicting[place]), int(batch.targets_R[place])))
    return found


def segments(batch):
    """For each segment, the tokens that ask and those that are seen."""
    tokens = batch.input_ids_BT.flatten()[batch.tokens_U]
    sizes = batch.q_offsets.diff().tolist(), batch.k_offsets.diff().tolist()
    parts = tokens.split(sizes[0]), tokens[batch.keys_K].split(sizes[1])
    return [(q.tolist(), k.tolist()) for q, k in zip(*parts, strict=True)]


def test_halves_keep_all_prompts_in_their_order(batch):
    halves = batch.halves()
    assert [len(half.ranks_BN) for half in halves] == [1, 2]
    rows = [row for half in halves for row in half.input_ids_BT]
    for row, whole in zip(rows, batch.input_ids_BT, strict=True):  # a part has no more padding than it needs
        assert torch.equal(row, whole[: len(row)]) and not whole[len(row) :].any()
    assert halves[0].halves() == [halves[0]]
    for parts in (responses, segments):
        assert [part for half in halves for part in parts(half)] == parts(batch)


def test_a_worker_process_hands_batches_over():
    collate = MicroBatchCollator(RankedCollator(pad_token_id=0), max_tokens=40)
    rows = make_rows(6)
    [worked] = torch.utils.data.DataLoader(rows, batch_size=6, num_workers=1, collate_fn=collate)
    here = collate(rows)["micro_batches"]
    assert len(worked["micro_batches"]) == len(here) > 1
    for one, other in zip(worked["micro_batches"], here, strict=True):
        assert all(torch.equal(tensor, getattr(other, name)) for name, tensor in vars(one).items())
