"""A new adapter that starts from the stack below: the model does not change, the factors are the sum's."""

from __future__ import annotations

import pytest
import torch
from families import make_model
from peft import LoraConfig

from tuna_peft.models.stack.adapters import push_adapter
from tuna_peft.models.stack.start import start_from_below

LORA = {"lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def stack(rank):
    """Two random adapters below a new one that leaves out one kind of layer."""
    model = make_model()
    for name in ("one", "second", "new"):
        targets = {"target_modules": ["up_proj", "q_proj"]} if name == "one" else {}
        model = push_adapter(model, name, LoraConfig(r=rank if name == "new" else 4, **{**LORA, **targets}))
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key and name != "new":
                torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("rank", [1, 4, 5, 40])
def test_the_model_does_not_change(rank):
    model, ids = stack(rank), torch.arange(3, 23)[None]
    before = model(ids).logits
    start_from_below(model)
    # Products of the size of the adapters below are added and taken away: rounding of fp32 remains.
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_it_has_the_largest_components_of_the_sum_and_both_factors_get_gradients():
    model = stack(4)
    start_from_below(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    parts = {name: (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in ("one", "second", "new")}
    updates = [layer.scaling[name] * parts[name][1] @ parts[name][0] for name in ("one", "second")]
    u, s, vh = torch.linalg.svd(sum(updates))
    down, up = parts["new"]
    torch.testing.assert_close(
        layer.scaling["new"] * up[:, :2] @ down[:2], (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-3, atol=1e-4
    )
    assert torch.equal(up[:, 2:], -up[:, :2]) and torch.equal(down[2:], down[:2])
    model(torch.arange(3, 23)[None]).logits.square().sum().backward()
    assert down.grad.abs().sum() > 0 and up.grad.abs().sum() > 0
    assert all(parameter.grad is None for part in ("one", "second") for parameter in parts[part])


def test_an_adapter_with_nothing_below_keeps_its_start():
    model = push_adapter(make_model(), "new", LoraConfig(r=4, **LORA))
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    start_from_below(model)
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
