"""Stacks whose hashes match and that are no usable stacks: refused by load, combine and merge alike."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import write_base, write_stack

from tuna_peft.errors import UserError
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.merge import merge_stack
from tuna_peft.files import sha256
from tuna_peft.models.stack.files import AdapterStack

KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("untrusted")
    return write_stack(root / "stack", write_base(root / "base"))


@pytest.fixture
def stack(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "stack")


def rewrite(stack, tensors=None, **config):
    """Changes the upper adapter and writes its hashes into the manifest, as a stranger could."""
    folder, manifest = stack / "ranking", json.loads((stack / "stack.json").read_text())
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    manifest["adapters"][1]["sha256"] = {file: sha256(folder / file) for file in manifest["adapters"][1]["sha256"]}
    (stack / "stack.json").write_text(json.dumps(manifest))


def refused(stack, tmp_path, why):
    for use in (
        lambda: AdapterStack.from_pretrained(stack, device="cpu"),
        lambda: combine_stack(stack, tmp_path / "combined"),
        lambda: merge_stack(stack, tmp_path / "merged"),
    ):
        with pytest.raises(UserError, match=why):
            use()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["stack"]


def tensors_of(stack):
    return load_file(stack / "ranking" / "adapter_model.safetensors")


def test_rewriting_alone_is_accepted(stack, tmp_path):
    rewrite(stack, tensors_of(stack))
    assert combine_stack(stack, tmp_path / "combined").adapters[-1] == "ranking"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(stack, tmp_path, value):
    tensors = tensors_of(stack)
    tensors[KEY.format("B")][-1, -1] = value
    rewrite(stack, tensors)
    refused(stack, tmp_path, "adapter 'ranking': .*down_proj.lora_B.weight holds NaN")


def test_integers(stack, tmp_path):
    rewrite(stack, {key: value.to(torch.int32) for key, value in tensors_of(stack).items()})
    refused(stack, tmp_path, "no floats")


def test_no_tensors(stack, tmp_path):
    rewrite(stack, {})
    refused(stack, tmp_path, "adapter 'ranking' has no tensors")


@pytest.mark.parametrize("missing", "AB")
def test_half_a_pair(stack, tmp_path, missing):
    tensors = tensors_of(stack)
    del tensors[KEY.format(missing)]
    rewrite(stack, tensors)
    refused(stack, tmp_path, "down_proj has factors of shapes .*None")


@pytest.mark.parametrize("rank", [1, 7, 999])
def test_a_rank_that_contradicts_the_tensors(stack, tmp_path, rank):
    rewrite(stack, r=rank, rank_pattern={})
    refused(stack, tmp_path, f"r is {rank}, and .* has factors of shapes")


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": -4}, {"r": True}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": "8"},
     {"lora_alpha": 1e300}, {"alpha_pattern": {"down_proj": float("inf")}}, {"rank_pattern": {"down_proj": None}}],
)  # fmt: skip
def test_ranks_and_alphas_that_are_no_positive_numbers(stack, tmp_path, config):
    rewrite(stack, **config)
    refused(stack, tmp_path, "adapter 'ranking' has (r|lora_alpha)=")


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": [1]},
        {"peft_type": "NONE"},
        {"target_modules": 5},
        {"target_modules": [None, "q_proj"]},
        {"exclude_modules": [1]},
        {"alpha_pattern": {"(": 1}},
        {"target_modules": "("},
    ],
)
def test_configurations_that_peft_cannot_read(stack, tmp_path, config):
    rewrite(stack, **config)
    refused(stack, tmp_path, "ranking")


def test_alpha_is_not_guessed(stack, tmp_path):
    file = stack / "ranking" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha"', '"lora_alfa"'))
    rewrite(stack)
    refused(stack, tmp_path, "adapter 'ranking' has no lora_alpha")


@pytest.mark.parametrize("content", [b"", b"\xff" * 30, b"\x08" + b"\0" * 7 + b"{}      "])
def test_weights_that_are_no_safetensors(stack, tmp_path, content):
    (stack / "ranking" / "adapter_model.safetensors").write_bytes(content)
    rewrite(stack)
    refused(stack, tmp_path, "weights of an adapter|has no tensors")


@pytest.mark.parametrize(
    "change",
    [
        {"base": ["model", "revision", "fingerprint"]},
        {"base": {"model": 5, "revision": None, "fingerprint": None}},
        {"base": {"model": "m", "revision": None, "fingerprint": 5}},
        {"quantization": {"load_in_4bit": "yes"}},
        {"quantization": {"llm_int8_threshold": 0.0}},
        {"quantization": [1]},
        {"prompt": {"template": 5}},
        {"prompt": {"unknown": "alpaca"}},
        {"prompt": [1]},
        {"load_dtype": "float8"},
        {"load_dtype": ["float32"]},
        {"adapters": 5},
        {"unknown": 5},
    ],
)
def test_manifests_of_another_shape(stack, tmp_path, change):
    file = stack / "stack.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(stack, tmp_path, "not a valid stack manifest")


def test_a_name_twice(stack, tmp_path):
    file = stack / "stack.json"
    manifest = json.loads(file.read_text())
    manifest["adapters"].append(manifest["adapters"][0])
    file.write_text(json.dumps(manifest))
    refused(stack, tmp_path, "two adapters have one name")


def test_a_key_twice(stack, tmp_path):
    file = stack / "stack.json"
    file.write_text(file.read_text().replace("{", '{"format": 1, ', 1))
    refused(stack, tmp_path, "the key `format` is given twice")
