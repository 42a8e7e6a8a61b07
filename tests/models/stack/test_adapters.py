"""Stacks of adapters: which one trains, which are active, and which configurations are rejected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel
from rounding import assert_rounded, operations_of
from tiny_llama import RANKING, SFT, load_tiny, stack_on, write_base

from tuna_peft.errors import UserError
from tuna_peft.models.stack.adapters import (
    active_adapters,
    adapter_names,
    drop_adapter,
    fingerprint,
    load_adapter,
    push_adapter,
    save_adapter,
    take_over,
    train_top_adapter,
)

TOKENS = torch.tensor([[1, 5, 9, 40]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trainable(model: PeftModel) -> set[str]:
    """Names of the adapters that hold a trainable parameter (`base` for anything else)."""
    names = adapter_names(model)
    keys = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    return {next((name for name in names if f".{name}." in key), "base") for key in keys}


@pytest.fixture
def stack(base_path: str) -> PeftModel:
    model = stack_on(load_tiny(base_path), sft=SFT, ranking=RANKING)
    train_top_adapter(model)
    return model


def test_only_the_top_adapter_trains_and_all_are_active(stack: PeftModel) -> None:
    assert adapter_names(stack) == ["sft", "ranking"]
    assert list(stack.active_adapters) == ["sft", "ranking"]
    assert trainable(stack) == {"ranking"}
    assert {parameter.dtype for parameter in stack.parameters() if parameter.requires_grad} == {torch.float32}


def test_training_changes_the_top_adapter_only(stack: PeftModel) -> None:
    below, top = fingerprint(stack, "sft"), fingerprint(stack, "ranking")
    stack.train()
    optimizer = torch.optim.SGD((p for p in stack.parameters() if p.requires_grad), lr=0.1)
    stack(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert {p.grad is None for p in stack.parameters() if not p.requires_grad} == {True}
    optimizer.step()
    assert fingerprint(stack, "sft") == below
    assert fingerprint(stack, "ranking") != top


def test_a_new_adapter_does_not_change_the_outputs_before_training(base_path: str) -> None:
    model = stack_on(load_tiny(base_path), sft=SFT)
    before = logits(model)
    model = push_adapter(model, "ranking", LoraConfig(**RANKING))
    # Its zeros may change the order of a sum, no more.
    assert_rounded(logits(model.eval()), before, operations_of(model))


def test_active_adapters_selects_and_restores(base_path: str, stack: PeftModel) -> None:
    whole = logits(stack.eval())
    base_alone = logits(load_tiny(base_path).model)
    sft_alone = logits(stack_on(load_tiny(base_path), sft=SFT))
    with active_adapters(stack, []):
        assert torch.equal(logits(stack), base_alone)
        assert trainable(stack) == set()
    with active_adapters(stack, ["sft"]):
        assert torch.equal(logits(stack), sft_alone)
        assert trainable(stack) == set()
    assert list(stack.active_adapters) == ["sft", "ranking"]
    assert trainable(stack) == {"ranking"}
    assert torch.equal(logits(stack), whole)


def test_active_adapters_restores_after_an_error(stack: PeftModel) -> None:
    with pytest.raises(RuntimeError, match="inside"), active_adapters(stack, ["sft"]):
        raise RuntimeError("inside")
    assert list(stack.active_adapters) == ["sft", "ranking"]
    assert trainable(stack) == {"ranking"}


def test_a_saved_adapter_comes_back_frozen_and_bitwise(base_path: str, stack: PeftModel, tmp_path: Path) -> None:
    save_adapter(stack, "sft", tmp_path / "sft")
    save_adapter(stack, "ranking", tmp_path / "ranking")
    loaded = load_tiny(base_path).model
    for name in ("sft", "ranking"):
        loaded = load_adapter(loaded, name, tmp_path / name)
    assert trainable(loaded) == set()
    assert [fingerprint(loaded, name) for name in ("sft", "ranking")] == [
        fingerprint(stack, name) for name in ("sft", "ranking")
    ]
    assert torch.equal(logits(loaded), logits(stack.eval()))


def test_an_adapter_for_other_shapes_is_refused(stack: PeftModel, tmp_path: Path) -> None:
    save_adapter(stack, "sft", tmp_path / "sft")
    wider = load_tiny(write_base(tmp_path / "wider", intermediate=192))
    with pytest.raises(UserError, match=r"does not fit this base: 4 tensors differ, the first is .*mlp"):
        load_adapter(wider.model, "sft", tmp_path / "sft")


def test_targets_that_the_base_lacks_are_refused(base_path: str) -> None:
    with pytest.raises(UserError, match="does not fit this base"):
        push_adapter(load_tiny(base_path).model, "sft", LoraConfig(target_modules=["c_attn"]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the frozen base"),
        ({"init_lora_weights": "olora"}, "changes the frozen base"),
        ({"init_lora_weights": "orthogonal"}, "changes the frozen base"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on the head"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "LoRA on the head"),
    ],
)
def test_unsupported_configurations_are_rejected_with_a_reason(base_path: str, settings: dict, reason: str) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=reason):
        push_adapter(load_tiny(base_path, "none").model, "sft", config)


def test_other_adapter_types_are_refused(base_path: str) -> None:
    with pytest.raises(UserError, match="not LoHaConfig"):
        push_adapter(load_tiny(base_path, "none").model, "sft", LoHaConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("name", ["sft", "../sft", "model", "q_proj", "a.b", ""])
def test_names_of_modules_and_adapters_are_rejected(base_path: str, name: str) -> None:
    model = stack_on(load_tiny(base_path, "none"), sft=SFT)
    with pytest.raises(UserError, match=r"already has an adapter|cannot name an adapter"):
        push_adapter(model, name, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("below", [[], ["sft"]])
def test_an_adapter_that_takes_over_computes_the_same_and_trains(base_path: str, below: list[str]) -> None:
    model = stack_on(load_tiny(base_path), **{name: SFT for name in below}, first=RANKING)
    before, weights = logits(model), fingerprint(model, "first")
    push_adapter(model, "second", LoraConfig(**RANKING))
    take_over(model)
    assert adapter_names(model) == list(model.active_adapters) == [*below, "second"]
    assert fingerprint(model, "second") == weights and torch.equal(logits(model), before)
    assert trainable(model) == {"second"}
    assert not any(".first." in name for name, _ in model.named_parameters())


def test_without_an_adapter_the_others_are_active_and_frozen(stack: PeftModel, base_path: str) -> None:
    drop_adapter(stack, "sft")
    assert list(stack.active_adapters) == ["ranking"] and trainable(stack) == set()
    assert not torch.equal(logits(stack), logits(load_tiny(base_path).model))


def test_equal_configurations_give_equal_files_in_every_process(tmp_path: Path) -> None:
    """The order of a set depends on the hash seed of the process; here seeds for which the orders differ."""
    code = """
import sys
import os
import subprocess
import sys
from pathlib import Path
from peft import LoraConfig
from tuna_peft.models.stack.adapters import save_config
modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
print(list(modules))
save_config(LoraConfig(target_modules=modules, exclude_modules={"layers.0", "layers.1"}), Path(sys.argv[1]))
"""
    orders, files = set(), set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        orders.add(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        files.add((tmp_path / seed / "adapter_config.json").read_bytes())
    assert len(orders) == 2 and len(files) == 1
