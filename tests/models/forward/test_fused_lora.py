"""Fused LoRA layers give the outputs and gradients of PEFT's layers."""

import pytest
import torch
from peft import LoraConfig
from tiny_llama import PROMPTS, RANKING, SFT, load_tiny, stack_on, write_base

from tuna_peft.models.forward.checkpointing import checkpoint_activations
from tuna_peft.models.forward.fused_lora import StackedLinear, StackedLinear4bit
from tuna_peft.models.stack.adapters import active_adapters, push_adapter, train_top_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def fused_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, StackedLinear | StackedLinear4bit)]


def set_fused(model, on):
    for layer in fused_layers(model):
        layer.fused = on


def outputs_and_gradients(model, dtype=torch.float32, checkpointing=False):
    model.zero_grad()
    ids = torch.tensor([PROMPTS[0]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("method", ["nf4", "none"])
@pytest.mark.parametrize("below", [{}, {"sft": SFT}, {"sft": SFT, "ranking": RANKING}])
def test_equals_peft(base, method, below):
    model = stack_on(load_tiny(base, method), **below, top={**SFT, "r": 3, "target_modules": "all-linear"})
    train_top_adapter(model)
    model.train()
    assert len(fused_layers(model)) == 14
    ours = outputs_and_gradients(model)
    model.enable_input_require_grads()
    checkpoint_activations(model, True, use_reentrant=False)
    recomputed = outputs_and_gradients(model)
    checkpoint_activations(model, False)
    set_fused(model, False)
    for value, again, expected in zip(ours, recomputed, outputs_and_gradients(model), strict=True):
        # Sums in another order: up to 7e-6 of the largest value, by the CPU's vector width.
        torch.testing.assert_close(value, expected, atol=3e-5 * expected.abs().max().item(), rtol=0)
        assert torch.equal(value, again)


def test_in_bf16_it_is_as_close_to_fp32_as_peft(base):
    model = stack_on(load_tiny(base, "nf4"), sft=SFT, ranking=RANKING)
    train_top_adapter(model)
    exact = outputs_and_gradients(model)
    errors = {}
    for fused in (True, False):
        set_fused(model, fused)
        found = outputs_and_gradients(model, torch.bfloat16)
        errors[fused] = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert max(errors[True]) < 1.5 * max(errors[False]) < 0.3


def test_follows_changes_of_active_adapters_and_of_their_weights(base):
    model = stack_on(load_tiny(base), sft=SFT, ranking=RANKING)
    ids = torch.tensor([PROMPTS[1]])

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    whole = logits()
    for names in (["sft"], ["ranking"], [], ["sft", "ranking"]):
        with active_adapters(model, names):
            ours = logits()
            set_fused(model, False)
            torch.testing.assert_close(ours, logits(), atol=1e-5, rtol=1e-5)
            set_fused(model, True)
    model.requires_grad_(False)
    logits()  # joins all factors
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sft." in name:
                parameter.mul_(2)
    doubled = logits()
    assert not torch.allclose(whole, doubled)
    set_fused(model, False)
    torch.testing.assert_close(doubled, logits(), atol=1e-5, rtol=1e-5)


def test_dropout_uses_the_forward_of_peft(base):
    model = push_adapter(load_tiny(base).model, "top", LoraConfig(**SFT, lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.tensor([PROMPTS[0]])
    torch.manual_seed(0)
    dropped = model.train()(input_ids=ids).logits
    assert not torch.allclose(dropped, model.eval()(input_ids=ids).logits)


def test_int8_uses_the_layers_of_peft(base):
    assert not fused_layers(stack_on(load_tiny(base, "int8"), sft=SFT))
