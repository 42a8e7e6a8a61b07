"""Starts of a new adapter from the stack below: the model does not change, the factors are the sum's."""

from __future__ import annotations

import pytest
import torch
from benchmarks.contest.starts import start_from_below
from families import make_model
from peft import LoraConfig

from tuna_peft.models.stack.adapters import push_adapter

LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("start", ["down", "mirrored"])
def test_it_starts_from_the_largest_components_of_the_sum(start):
    model = make_model()
    for name in ("one", "second", "new"):
        model = push_adapter(model, name, LoraConfig(**LORA))
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key and name != "new":
                torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(3, 23)[None]
    before = model(ids).logits
    start_from_below(model, start)
    after = model(ids).logits
    # A mirrored start adds and takes away products of the size of the adapters below: rounding of fp32 remains.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    parts = {name: (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in ("one", "second", "new")}
    total = sum(layer.scaling[name] * parts[name][1] @ parts[name][0] for name in ("one", "second"))
    u, s, vh = torch.linalg.svd(total)
    down, up = parts["new"]
    if start == "down":
        assert not up.any()
        torch.testing.assert_close((down @ vh[:4].T).abs(), torch.eye(4) / 3**0.5, rtol=1e-3, atol=1e-3)
    else:
        half = layer.scaling["new"] * up[:, :2] @ down[:2]
        torch.testing.assert_close(half, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-3, atol=1e-4)
        assert torch.equal(up[:, 2:], -up[:, :2]) and torch.equal(down[2:], down[:2])
