"""Dense weights give the model's own logits to rounding, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import PROMPTS, RANKING, SFT, load_tiny, stack_on

from tuna_peft.limits import DENSE_COPY
from tuna_peft.models.base.load import load_base, make_quantization_config
from tuna_peft.models.generation import dense
from tuna_peft.models.generation.dense import dense_weights, has_room_for_dense
from tuna_peft.models.generation.generate import generate_responses, stream_responses
from tuna_peft.models.stack.adapters import active_adapters, train_top_adapter

IDS = torch.tensor(PROMPTS[:1])


@pytest.fixture(params=["nf4", "none"])
def stack(request, base_path):
    return stack_on(load_tiny(base_path, request.param), sft=SFT, ranking=RANKING)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def within_rounding(found, expected, dtype, products=2 * 128):
    """Both round a sum of `products` terms in each of about fifteen layers, with errors that add up at random."""
    bound = 15 * products**0.5 * torch.finfo(dtype).eps * expected.abs().max()
    return (found - expected).abs().max() <= bound


@pytest.mark.parametrize("adapters", [["sft", "ranking"], ["sft"], []])
def test_logits_are_those_of_the_active_adapters(stack, adapters):
    with active_adapters(stack, adapters):
        expected = logits(stack)
        with dense_weights(stack):
            found = logits(stack)
        assert torch.equal(logits(stack), expected)  # the layers are as they were
    if adapters:
        assert not torch.equal(found, expected)  # the copy was used
    assert within_rounding(found, expected, torch.float32)


@pytest.fixture
def packed(stack, monkeypatch):
    """A stack whose copy is in fp16, as on a CPU with AVX2 and a larger model."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("needs FBGEMM")
    monkeypatch.setattr(dense, "packs_fp16", lambda hidden: True)
    return stack


def test_packed_weights_are_those_of_the_active_adapters_in_fp16(packed):
    """Each output is off by at most the rounding of its weights to fp16, and of sums in fp32."""
    adapted = [module for module in packed.modules() if hasattr(module, "lora_A")]
    layers = [*adapted, packed.get_base_model().lm_head]
    with active_adapters(packed, ["sft"]), torch.no_grad():
        rows = [torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)) for layer in layers]
        expected = [layer(x) for layer, x in zip(layers, rows, strict=True)]
        # A column of the identity at a time: the exact weights.
        sizes = [(x.abs() @ layer(torch.eye(layer.in_features)).abs()) for layer, x in zip(layers, rows, strict=True)]
        with dense_weights(packed):
            found = [layer(x) for layer, x in zip(layers, rows, strict=True)]
            replaced = [name for name, module in packed.named_modules() if "forward" in vars(module)]
        assert len(replaced) >= len(layers) and {".lora_" in name for name in replaced} == {False}
    eps = torch.finfo(torch.float16).eps / 2 + layers[-1].in_features * torch.finfo(torch.float32).eps
    for one, other, size in zip(found, expected, sizes, strict=True):
        assert ((one - other).abs() <= eps * size + 2**-24 * size.max()).all()  # the last for subnormal weights
    assert {torch.equal(one, other) for one, other in zip(found, expected, strict=True)} == {False}
    assert {"forward" in vars(module) for module in packed.modules()} == {False}


def test_a_packed_copy_takes_two_bytes_a_weight_and_has_the_head(packed, monkeypatch):
    kinds = "Linear4bit", "Linear"
    linear = [m for name, m in packed.named_modules() if type(m).__name__ in kinds and ".lora_" not in name]
    size = 2 * sum(layer.in_features * layer.out_features for layer in linear)
    monkeypatch.setattr(dense, "free_bytes", lambda device: size / DENSE_COPY)
    assert has_room_for_dense(packed)
    monkeypatch.setattr(dense, "free_bytes", lambda device: size / DENSE_COPY - 1)
    assert not has_room_for_dense(packed)


def test_16_bit_weights_stay_apart_from_the_adapters(base_path):
    config = make_quantization_config("nf4", compute_dtype=torch.bfloat16)
    base = load_base(base_path, quantization_config=config, device="cpu", dtype="bfloat16")
    stack = stack_on(base, sft=SFT)
    expected = logits(stack)
    for name, parameter in stack.named_parameters():
        if "lora_B" in name:
            parameter.data /= 1000  # too small to survive a sum in bf16
    little = logits(stack)
    with active_adapters(stack, []):
        none = logits(stack)
    assert not torch.equal(little, none)
    with dense_weights(stack):
        found = logits(stack)
    assert within_rounding(found, little, torch.bfloat16) and not torch.equal(found, expected)


def test_generation_holds_them_until_it_ends_or_is_left(stack, base_path):
    tokenizer = load_tiny(base_path, "none").tokenizer
    layer = next(module for module in stack.modules() if hasattr(module, "lora_A"))
    plain = generate_responses(stack, tokenizer, PROMPTS, dense=False)
    assert generate_responses(stack, tokenizer, PROMPTS, dense=True) == plain
    assert "forward" not in vars(layer)
    samples = stream_responses(stack, tokenizer, PROMPTS, batch_size=1, dense=True)
    next(samples)
    assert "forward" in vars(layer)
    samples.close()
    assert "forward" not in vars(layer)


def test_a_model_that_trains_afterwards_gets_the_same_gradients(stack):
    train_top_adapter(stack)

    def gradients():
        stack.zero_grad()
        stack(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in stack.parameters() if parameter.grad is not None]

    before = gradients()
    with dense_weights(stack):
        logits(stack)
    for one, other in zip(gradients(), before, strict=True):
        assert torch.equal(one, other)


def test_room_is_a_share_of_free_memory(stack, base_path, monkeypatch):
    layers = [module for module in stack.modules() if hasattr(module, "lora_A")]
    if stack.get_base_model().config.to_dict().get("quantization_config"):  # every layer, not only the adapted ones
        layers = [module for module in stack.modules() if type(module).__name__ == "Linear4bit"]
    size = 4 * sum(layer.in_features * layer.out_features for layer in layers)
    monkeypatch.setattr(dense, "free_bytes", lambda device: size / DENSE_COPY)
    assert has_room_for_dense(stack)
    monkeypatch.setattr(dense, "free_bytes", lambda device: size / DENSE_COPY - 1)
    assert not has_room_for_dense(stack)
    assert not has_room_for_dense(load_tiny(base_path, "int8").model)  # its products round activations too
    assert not has_room_for_dense(load_tiny(base_path, "none").model)  # nothing to gain
