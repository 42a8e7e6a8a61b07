"""A sharded base in one process; several processes are tested in tests/run/test_processes.py."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from tuna_peft import UserError
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.base.load import load_base, make_quantization_config
from tuna_peft.models.base.shards import is_sharded, shard_base
from tuna_peft.models.stack.files import quantization_of


def pico(storage_dtype):
    quantization = make_quantization_config("nf4", storage_dtype=storage_dtype)
    return load_base("builtin:pico-llama", quantization_config=quantization, device="cpu").model


def a_layer(model):
    return next(module for module in model.modules() if isinstance(module, Linear4bit))


def test_codes_stored_as_floats_are_the_same_bits():
    bytes_, floats = pico(torch.uint8), pico(torch.bfloat16)
    ours, theirs = a_layer(floats), a_layer(bytes_)
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.weight.data.view(torch.uint8).flatten(), theirs.weight.data.flatten())
    assert torch.equal(dequantised_weight(ours), dequantised_weight(theirs))
    assert quantization_of(floats) == quantization_of(bytes_)  # so a manifest does not tell them apart


def test_gathered_codes_are_dequantized_with_the_state_of_their_layer():
    layer = a_layer(pico(torch.float32))
    before = dequantised_weight(layer)
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(dequantised_weight(layer), before)


def test_unknown_layer_classes_are_an_error():
    model = pico(torch.float32)
    with pytest.raises(UserError, match="llama has no layers called OtherLayer to shard"):
        shard_base(model, mesh=None, layers=["OtherLayer"])
    assert not is_sharded(model)
