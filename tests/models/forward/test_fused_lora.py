"""Fused LoRA layers give the outputs and gradients of PEFT's layers."""

import bitsandbytes
import pytest
import torch
from launches import Launches
from peft import LoraConfig
from rounding import assert_rounded, gradient_operations, operations_of, rounding
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
        assert_rounded(value, expected, gradient_operations(model))
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
    # Norms, in which the errors within a product average out: one for each of the matrices in sequence.
    assert max(errors[True]) < 1.5 * max(errors[False]) < 1.5 * rounding(len(fused_layers(model)), 1, torch.bfloat16)


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
            assert_rounded(ours, logits(), operations_of(model))
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
    assert_rounded(doubled, logits(), operations_of(model))


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


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_follows_the_steps_of_optimizers(base, optimizer):
    """bitsandbytes' optimizers change weights without raising their `_version`."""
    model = stack_on(load_tiny(base, "nf4"), sft=SFT, ranking=RANKING)
    train_top_adapter(model)
    steps = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    before = outputs_and_gradients(model)[0]
    steps.step()
    after = outputs_and_gradients(model)
    set_fused(model, False)
    for value, expected in zip(after, outputs_and_gradients(model), strict=True):
        torch.testing.assert_close(value, expected, atol=3e-5 * expected.abs().max().item(), rtol=0)
    assert (after[0] - before).abs().max() > 1e-3 * before.abs().max()


def test_follows_changes_that_leave_no_trace_outside_of_training(base):
    """`.data` has a version of its own."""
    model = stack_on(load_tiny(base, "none"), sft=SFT, ranking=RANKING)
    train_top_adapter(model)
    outputs_and_gradients(model.train())
    model.eval()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B.ranking" in name:
                parameter.data *= 2
        after = model(input_ids=ids).logits
    assert not torch.equal(before, after)


def test_factors_that_will_not_be_used_again_are_not_kept(base):
    """Joined factors of all layers at the peak of a generation are not in the plan."""
    model = stack_on(load_tiny(base, "none"), sft=SFT, ranking=RANKING)
    train_top_adapter(model)
    outputs_and_gradients(model.train())
    assert all(layer._factors for layer in fused_layers(model))
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([PROMPTS[0]]))
    assert not any(layer._factors for layer in fused_layers(model) if len(layer.lora_A) == 2)


def test_the_factors_are_joined_once_for_all_passes_of_a_step(base):
    """Of an unquantized layer with a frozen and a trained adapter remain the operations of the module's equation."""
    model = stack_on(load_tiny(base, "none"), sft=SFT, ranking=RANKING)
    train_top_adapter(model)
    layer = next(layer for layer in fused_layers(model) if len(layer.lora_A) == 2).train()
    x = torch.randn(5, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    with Launches() as forward:
        y = layer(x)
    gradient = torch.ones_like(y)
    x.grad = None
    layer.zero_grad()
    with Launches() as backward:
        y.backward(gradient)
    # W x, A x, and B A x added; backward the gradients of A x (1), x (2), A (1) and B (2: the product and its scale).
    assert (forward.count, backward.count) == (3, 6)
