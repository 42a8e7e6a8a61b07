"""The growing cache has the contents of transformers' own cache, also after rows are selected or cropped."""

import weakref

import pytest
import torch
from families import FAMILIES, make_model
from rounding import assert_rounded, operations_of
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tuna_peft.limits import CACHE_ROOM
from tuna_peft.models.generation.growing_cache import GrowingLayer


def test_same_contents_as_the_dynamic_layer():
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()

    def grow(batch, tokens):
        states = torch.randn(batch, 2, tokens, 4), torch.randn(batch, 2, tokens, 4)
        for found, expected in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(found, expected)

    grow(3, 5)
    for _ in range(CACHE_ROOM + 2):  # past the first buffer
        grow(3, 1)
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([2, 0, 0, 1]))
    grow(4, 1)
    for layer in (ours, theirs):
        layer.crop(-3)
    grow(4, 2)
    assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_new_token_copies_no_old_ones():
    layer = GrowingLayer()
    layer.update(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4))
    place = layer.keys.data_ptr()
    for _ in range(CACHE_ROOM):
        layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert layer.keys.data_ptr() == place


def test_selecting_rows_frees_the_old_buffer():
    layer = GrowingLayer()
    layer.update(torch.zeros(3, 1, 8, 4), torch.zeros(3, 1, 8, 4))
    buffers = [weakref.ref(buffer) for buffer in layer._buffers]
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert [buffer() for buffer in buffers] == [None, None]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_give_the_same_logits(family):
    model, ids = make_model(family), torch.arange(3, 15)[None]
    logits = []
    for layer_type in (DynamicLayer, GrowingLayer):
        cache = DynamicCache(config=model.config)
        cache.layers = [layer_type() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        steps = [ids[:, :6], *ids[:, 6:].split(1, dim=1)]
        logits.append(torch.cat([model(input_ids=step, past_key_values=cache).logits for step in steps], dim=1))
    assert_rounded(logits[1], logits[0], operations_of(model))
