"""The combined adapter: the stack's function, to fp32 rounding, in a form that plain PEFT loads."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from rounding import assert_rounded, rounded, stack_kl_bound
from safetensors.torch import load_file, save_file
from tiny_llama import PROMPTS, RANKING, SFT, Tiny, load_tiny, write_stack

from tuna_peft.errors import UserError
from tuna_peft.export.check import check_exports
from tuna_peft.export.combine import combine_stack
from tuna_peft.files import sha256

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_factors_are_the_concatenation_worked_out_by_hand(tiny: Tiny, tmp_path: Path) -> None:
    report = combine_stack(tiny.stack, tmp_path / "combined")
    combined = load_file(tmp_path / "combined" / "adapter_model.safetensors")
    sft = load_file(tiny.stack / "sft" / "adapter_model.safetensors")
    ranking = load_file(tiny.stack / "ranking" / "adapter_model.safetensors")

    def pair(tensors: dict[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
        key = f"base_model.model.model.layers.1.{module}"
        return tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]

    # down_proj, layer 1: r=8, alpha=20 below; r=4, alpha=10 (its own), rank-stabilised above
    (a1, b1), (a2, b2), (a, b) = (pair(part, "mlp.down_proj") for part in (sft, ranking, combined))
    assert torch.equal(a, torch.cat([a1, a2]))
    assert_rounded(b, torch.cat([b1 * 20 / 8, b2 * 10 / math.sqrt(4)], dim=1), 2)
    # o_proj: only the upper adapter, with rank 3 and the common alpha 6
    (a2, b2), (a, b) = pair(ranking, "self_attn.o_proj"), pair(combined, "self_attn.o_proj")
    assert a.shape == (3, 64)
    assert torch.equal(a, a2)
    assert_rounded(b, b2 * 6 / math.sqrt(3), 2)
    assert {tensor.dtype for tensor in combined.values()} == {torch.float32}
    assert (report.adapters, report.rank, report.modules) == (["sft", "ranking"], 12, 10)


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
@pytest.mark.parametrize(
    "adapters",
    [
        {"sft": SFT, "ranking": RANKING},
        {"one": {"r": 4, "lora_alpha": 7, "target_modules": EVERYTHING}},
        {
            "low": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
            "mid": {
                "r": 5,
                "lora_alpha": 5,
                "target_modules": r".*layers\.0\.mlp\.(gate|up)_proj",
                "use_rslora": True,
            },
            "top": {"r": 3, "lora_alpha": 16, "target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        },
    ],
    ids=["two-stages", "one-stage", "partial-targets"],
)
def test_it_is_the_stack(tiny: Tiny, tmp_path: Path, method: str, adapters: dict[str, Any]) -> None:
    stack = write_stack(tmp_path / "stack", tiny.base, method, **adapters)
    combine_stack(stack, tmp_path / "combined")
    found = check_exports(stack, [tmp_path / "combined"], PROMPTS, device="cpu")[str(tmp_path / "combined")]
    assert found.kl_max <= stack_kl_bound(stack)
    assert found.top1_agreement == 1
    assert found.tokens == sum(map(len, PROMPTS))


def test_plain_peft_loads_it_without_missing_or_unexpected_keys(tiny: Tiny, tmp_path: Path) -> None:
    combine_stack(tiny.stack, tmp_path / "combined")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(load_tiny(tiny.base).model, str(tmp_path / "combined"))
    result = loaded.load_adapter(str(tmp_path / "combined"), "default")
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert not result.unexpected_keys
    scalings = {module.scaling["default"] for module in loaded.modules() if isinstance(module, LoraLayer)}
    assert scalings == {1.0}


def test_the_configuration_is_short_where_it_can_be(tiny: Tiny, tmp_path: Path) -> None:
    combine_stack(tiny.stack, tmp_path / "combined")
    config = LoraConfig.from_pretrained(str(tmp_path / "combined"))
    assert config.target_modules == {"q_proj", "v_proj", "up_proj", "o_proj", "down_proj"}
    assert config.rank_pattern == config.alpha_pattern == {"q_proj": 8, "up_proj": 8, "o_proj": 3}
    assert config.base_model_name_or_path == tiny.base
    assert (config.r, config.lora_alpha, config.use_rslora, config.inference_mode) == (12, 12, False, True)


def test_a_smaller_rank_is_the_best_of_its_rank(tiny: Tiny, tmp_path: Path) -> None:
    """Against numpy's SVD of the full update."""
    report = combine_stack(tiny.stack, tmp_path / "exact")
    assert report.compression_error is None
    report = combine_stack(tiny.stack, tmp_path / "small", rank=5)
    exact, small = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "small"))
    errors = json.loads((tmp_path / "small" / "compression_error.json").read_text())
    assert set(errors) == {key.split(".lora_")[0].removeprefix("base_model.model.") for key in small}
    for module, error in errors.items():
        key = f"base_model.model.{module}.lora_"
        update, best = (t[f"{key}B.weight"].double() @ t[f"{key}A.weight"].double() for t in (exact, small))
        u, s, v = np.linalg.svd(update.numpy())
        assert_rounded(best, torch.from_numpy((u[:, :5] * s[:5]) @ v[:5]), 5)
        relative = ((update - best).norm() / update.norm()).item()
        assert error == rounded(relative, 5, 1.0)
        assert small[f"{key}A.weight"].shape[0] == min(5, exact[f"{key}A.weight"].shape[0])
    assert errors["model.layers.0.self_attn.o_proj"] == 0  # its rank is 3
    assert report.rank == 5
    assert report.compression_error == {"mean": sum(errors.values()) / 10, "max": max(errors.values())}


def test_plain_peft_loads_a_smaller_rank_and_the_distance_shrinks_with_it(tiny: Tiny, tmp_path: Path) -> None:
    ranks = (2, 6, 12)
    for rank in ranks:
        combine_stack(tiny.stack, tmp_path / str(rank), rank=rank)
    found = check_exports(tiny.stack, [tmp_path / str(rank) for rank in ranks], PROMPTS, device="cpu")
    kls = [found[str(tmp_path / str(rank))].kl_mean for rank in ranks]
    bound = stack_kl_bound(tiny.stack)
    assert kls[0] > kls[1] > 100 * bound
    assert kls[2] <= bound  # the ranks add up to 12
    with pytest.raises(UserError, match="cannot compress to rank 0"):
        combine_stack(tiny.stack, tmp_path / "none", rank=0)


def test_upto_combines_the_lower_part(tiny: Tiny, tmp_path: Path) -> None:
    report = combine_stack(tiny.stack, tmp_path / "combined", upto="sft")
    assert report.adapters == ["sft"]
    found = check_exports(tiny.stack, [report.path], PROMPTS, upto="sft", device="cpu")[str(report.path)]
    assert found.kl_max <= stack_kl_bound(tiny.stack, upto="sft")


def _edit_adapter(stack: Path, name: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Changes an adapter on disk, and its hash with it, as another tool might have written it."""
    file = stack / name / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    weights = stack / name / "adapter_model.safetensors"
    save_file(load_file(weights) | tensors, weights)
    manifest = json.loads((stack / "stack.json").read_text())
    entry = next(entry for entry in manifest["adapters"] if entry["name"] == name)
    entry["sha256"] = {file.name: sha256(file) for file in (weights, weights.with_name("adapter_config.json"))}
    (stack / "stack.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"use_dora": True}, None, "DoRA"),
        ({"bias": "lora_only"}, None, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"lora_bias": True}, None, "lora_bias"),
        ({}, "base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_A"),
        ({}, "base_model.model.model.layers.0.self_attn.q_proj.bias", "q_proj.bias"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], key: str | None, reason: str
) -> None:
    stack = shutil.copytree(tiny.stack, tmp_path / "stack")
    _edit_adapter(stack, "ranking", settings, {key: torch.zeros(2, 2)} if key else {})
    with pytest.raises(UserError, match=reason) as error:
        combine_stack(stack, tmp_path / "combined")
    assert "'ranking'" in error.value.what
    assert not (tmp_path / "combined").exists()


def test_an_empty_stack_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    stack = shutil.copytree(tiny.stack, tmp_path / "stack")
    manifest = json.loads((stack / "stack.json").read_text()) | {"adapters": []}
    (stack / "stack.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no adapters to combine"):
        combine_stack(stack, tmp_path / "combined")
