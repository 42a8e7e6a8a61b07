"""The merged model: right weights against a slow computation, and files that plain transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from rounding import assert_rounded, kl_bound, rounding, stack_kl_bound
from safetensors.torch import load_file, save_file
from spies import Seen, spy
from tiny_llama import PROMPTS, RANKING, SFT, Tiny, load_tiny, stack_on, write_base, write_stack
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tuna_peft.errors import UserError
from tuna_peft.export import base_weight, merge
from tuna_peft.export.base_weight import dequantised, quantise_4bit, quantised_modules, require_linear, skeleton
from tuna_peft.export.check import check_exports
from tuna_peft.export.divergence import divergence, iter_logits
from tuna_peft.export.merge import merge_stack
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.base.load import load_base, make_quantization_config
from tuna_peft.models.base.stored_weights import safetensors_files
from tuna_peft.models.stack.files import AdapterStack, quantization_of, save_stack

RANKS = 8 + 4  # the products that one entry of the update sums up


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in safetensors_files(str(folder)) for name, tensor in load_file(file).items()}


def stack_delta(stack: Path, module: str) -> torch.Tensor | float:
    """sum_k s_k B_k A_k in float64, from the adapters' files, with the scalings of `tiny_llama` written out."""
    leaf = module.rpartition(".")[2]
    scalings = {
        "sft": 20 / 8,
        "ranking": (10 if module == "model.layers.1.mlp.down_proj" else 6) / math.sqrt(3 if leaf == "o_proj" else 4),
    }
    delta: torch.Tensor | float = 0.0
    for name, scaling in scalings.items():
        tensors = load_file(stack / name / "adapter_model.safetensors")
        if f"base_model.model.{module}.lora_A.weight" in tensors:
            a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
            b = tensors[f"base_model.model.{module}.lora_B.weight"].double()
            delta = delta + scaling * (b @ a)
    return delta


@pytest.mark.parametrize(
    ("method", "double_quant"),
    [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False), ("none", False)],
)
def test_every_weight_is_what_the_live_layers_and_the_factors_add_up_to(
    tiny: Tiny, tmp_path: Path, method: str, double_quant: bool
) -> None:
    stack = write_stack(tmp_path / "stack", tiny.base, method, double_quant=double_quant)
    report = merge_stack(stack, tmp_path / "merged", dtype="float32")
    merged = tensors_of(tmp_path / "merged")
    live = dict(load_tiny(tiny.base, method, double_quant=double_quant).model.named_modules())
    assert set(merged) == set(tensors_of(tiny.base))
    assert (report.tensors, report.merged) == (len(merged), 10)
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        expected = dequantised_weight(live[module]).double() + stack_delta(stack, module)
        assert tensor.dtype == torch.float32
        assert_rounded(tensor, expected, RANKS, name=name)


def test_the_original_route_starts_from_the_stored_weights(tiny: Tiny, tmp_path: Path) -> None:
    merge_stack(tiny.stack, tmp_path / "merged", dtype="float32", base="original")
    stored = tensors_of(tiny.base)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        expected = stored[name].double() + stack_delta(tiny.stack, name.removesuffix(".weight"))
        assert_rounded(tensor, expected, RANKS, name=name)


def test_the_british_name_of_the_dequantized_base_is_accepted(tiny: Tiny, tmp_path: Path) -> None:
    reports = [
        merge_stack(tiny.stack, tmp_path / base, dtype="float32", base=base) for base in ("dequantised", "dequantized")
    ]
    assert [report.base for report in reports] == ["dequantized", "dequantized"]
    weights = [(report.path / "model.safetensors").read_bytes() for report in reports]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_the_fp32_merge_rounded_once(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    merge_stack(tiny.stack, tmp_path / "full", dtype="float32")
    merge_stack(tiny.stack, tmp_path / "half", dtype=dtype)
    full, half = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "half")
    for name, tensor in half.items():
        assert torch.equal(tensor, full[name].to(getattr(torch, dtype))), name


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_the_base_is_taken_as_it_was_loaded_in_training(tiny: Tiny, tmp_path: Path, method: str) -> None:
    """A stack trained in bf16 on a GPU and merged on a CPU, where the default is fp32."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    stored = {name: x.float() + 1e-4 for name, x in tensors_of(base).items()}  # no bf16 numbers
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = make_quantization_config(method)
    live = load_base(str(base), quantization_config=config, dtype="bfloat16", device="cpu")
    save_stack(stack_on(live, sft=SFT, ranking=RANKING), tmp_path / "stack")
    merge_stack(tmp_path / "stack", tmp_path / "merged", dtype="float32", device="cpu")
    layers = dict(live.model.named_modules())
    for name, tensor in tensors_of(tmp_path / "merged").items():
        module = name.removesuffix(".weight")
        layer = layers.get(module.replace("model.", "base_model.model.model.", 1), layers.get(module))
        expected = dequantised_weight(getattr(layer, "base_layer", layer)).double()
        expected = expected + stack_delta(tmp_path / "stack", module)
        assert_rounded(tensor, expected, RANKS, name=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_divergence_from_the_live_stack(tmp_path: Path, method: str, tied: bool) -> None:
    stack = write_stack(tmp_path / "stack", write_base(tmp_path / "base", tied=tied), method)
    dtypes = ("float32", "float16", "bfloat16")
    for dtype in dtypes:
        merge_stack(stack, tmp_path / dtype, dtype=dtype)
    found = check_exports(stack, [tmp_path / dtype for dtype in dtypes], PROMPTS, device="cpu")
    exact, half, brain = (found[str(tmp_path / dtype)].kl_mean for dtype in dtypes)
    assert 0 <= exact <= stack_kl_bound(stack) < half
    # A divergence grows with the square of the differences, and bf16 has three bits less than fp16.
    assert 64 / 4 < brain / half < 64 * 4
    assert min(found[str(tmp_path / dtype)].top1_agreement for dtype in dtypes) >= 0.9


def test_8_bits_match_the_products_of_training(tiny: Tiny, tmp_path: Path) -> None:
    """In evaluation the live layers round activations to int8 too, which no weight can repeat; in training not."""
    stack = write_stack(tmp_path / "stack", tiny.base, "int8")
    merge_stack(stack, tmp_path / "merged", dtype="float32")
    live = AdapterStack.from_pretrained(stack, device="cpu").model.train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batches = [torch.tensor([prompt]) for prompt in PROMPTS]
    assert divergence(iter_logits(live, batches), merged, batches).kl_max <= kl_bound(merged)


def test_plain_transformers_loads_everything_that_belongs_to_it(tiny: Tiny, tmp_path: Path) -> None:
    (Path(tiny.base) / "LICENSE").write_text("some licence")
    merge_stack(tiny.stack, tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w5 w9").input_ids == [5, 9]
    assert (tmp_path / "merged" / "LICENSE").read_text() == "some licence"
    assert model.generate(torch.tensor([PROMPTS[0]]), do_sample=False).shape[1] > len(PROMPTS[0])


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": 2}, 2), ({"eos_token_id": [5, 9]}, [5, 9, 2]), ({"max_new_tokens": 3}, [2]), (None, 2)],
)
def test_generation_stops_where_responses_ended_in_training(
    tiny: Tiny, tmp_path: Path, generation: dict[str, Any] | None, expected: Any
) -> None:
    base = shutil.copytree(tiny.base, tmp_path / "base")
    (base / "generation_config.json").unlink()
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    merge_stack(tiny.stack, tmp_path / "merged", base_model=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == expected


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    merge_stack(write_stack(tmp_path / "stack", base), tmp_path / "merged")
    assert "lm_head.weight" not in tensors_of(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_shards_in_and_out_hold_the_same_weights(tiny: Tiny, tmp_path: Path) -> None:
    sharded = write_base(tmp_path / "base", max_shard_size="40KB")
    assert len(safetensors_files(sharded)) > 2
    whole = merge_stack(tiny.stack, tmp_path / "whole")
    parts = merge_stack(tiny.stack, tmp_path / "parts", base_model=sharded, max_shard_size="50KB")
    assert whole.files == 1
    assert parts.files > 2
    assert {path.name for path in (tmp_path / "parts").glob("*.safetensors")} == {
        f"model-{i + 1:05d}-of-{parts.files:05d}.safetensors" for i in range(parts.files)
    }
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.nbytes == parts.nbytes
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert set(found) == set(expected) == set(index["weight_map"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", output_loading_info=True)
    assert not info["missing_keys"]
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()


def test_upto_merges_the_lower_part(tiny: Tiny, tmp_path: Path) -> None:
    merge_stack(tiny.stack, tmp_path / "merged", dtype="float32", upto="sft")
    found = check_exports(tiny.stack, [tmp_path / "merged"], PROMPTS, upto="sft", device="cpu")[
        str(tmp_path / "merged")
    ]
    assert found.kl_max <= stack_kl_bound(tiny.stack, upto="sft")


@pytest.mark.parametrize("part", [1 << 14, 7], ids=["whole", "in-parts"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_dequantised_is_bitwise_the_live_weight(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str, double_quant: bool, part: int
) -> None:
    monkeypatch.setattr(base_weight, "_PART", part)
    model = load_tiny(tiny.base, method, double_quant=double_quant).model
    settings, stored = quantization_of(model), tensors_of(tiny.base)
    assert settings is not None
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            found = dequantised(stored[name + ".weight"], settings, torch.float32)
            assert torch.equal(found, dequantised_weight(layer)), name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_and_scales_are_bitsandbytes_own(quant_type: str, dtype: torch.dtype, double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(96, 171) * torch.logspace(-6, 2, 96)[:, None]).to(dtype)
    levels = bnb.get_4bit_type(quant_type, device="cpu").sort().values
    weight[0, :31] = torch.cat([levels, (levels[1:] + levels[:-1]) / 2]).to(dtype)  # on the levels and between
    weight[1:3] = 0
    settings = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    codes, state = quantise_4bit(weight, settings, dtype)
    expected, theirs = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
    assert torch.equal(codes[: expected.numel()], expected.view(-1))
    ours, theirs = state.as_dict(packed=True), theirs.as_dict(packed=True)
    assert set(ours) == set(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("shape", [(64, 128), (64, 96), (172, 64), (10, 30)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantised_is_nf4_for_every_shape(shape: tuple[int, int], double_quant: bool) -> None:
    """Also for rows that bitsandbytes' CPU kernel miscounts: nearest NF4 level times the block's scale, worked out."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    levels = bnb.get_4bit_type("nf4", device="cpu")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    found = dequantised(weight, settings, torch.float32)
    expected = torch.cat(
        [
            block.abs().max() * levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)]
            for block in weight.view(-1).split(64)
        ]
    ).view(shape)
    bound = rounding(1, expected)
    if double_quant:  # bitsandbytes rounds scales, less their mean, to levels that are up to 0.9 / 64 apart
        scales = torch.stack([block.abs().max() for block in weight.view(-1).split(64)])
        bound += 0.9 / 64 / 2 * (scales - scales.mean()).abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_the_skeleton_selects_what_transformers_quantises(tiny: Tiny) -> None:
    settings = json.loads((tiny.stack / "stack.json").read_text())["quantization"]
    live = {name for name, module in load_tiny(tiny.base).model.named_modules() if "4bit" in type(module).__name__}
    assert quantised_modules(skeleton(Path(tiny.base), settings)) == live
    assert quantised_modules(skeleton(Path(tiny.base), None)) == set()
    assert "lm_head" not in live
    assert len(live) == 14


def test_layers_that_are_not_linear_are_refused(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores (in, out): a square one would merge transposed without an error."""
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    for settings in (None, {"load_in_4bit": True}):
        with pytest.raises(UserError, match=r"has a Conv1D, not a Linear, at 'transformer\.h\.0\.attn\.c_proj'"):
            require_linear(skeleton(tmp_path, settings), ["transformer.h.0.attn.c_proj"])


def _rewrite_base(tiny: Tiny, folder: Path, change: Any) -> Path:
    """Copies the base with other weights, and makes a stack whose manifest expects exactly those."""
    shutil.copytree(tiny.base, folder / "base")
    file = folder / "base" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    stack = shutil.copytree(tiny.stack, folder / "stack")
    manifest = json.loads((stack / "stack.json").read_text())
    manifest["base"] = {"model": str(folder / "base"), "revision": None, "fingerprint": None}
    (stack / "stack.json").write_text(json.dumps(manifest))
    return stack


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.gate_up"): x for name, x in t.items()},
            r"no weight for 'model\.layers\.1\.mlp\.up_proj'",
        ),
        (
            lambda t: {name.removeprefix("model."): x for name, x in t.items()},
            r"no weight for 'model\.layers\.0\.",
        ),
        (
            lambda t: t | {"model.layers.0.mlp.up_proj.weight": torch.zeros(100, 64)},
            r"up_proj' is \(128, 64\), the base's \(100, 64\)",
        ),
    ],
    ids=["fused", "renamed", "other-shape"],
)
def test_a_layout_without_the_weight_is_refused_by_module(
    tiny: Tiny, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        merge_stack(_rewrite_base(tiny, tmp_path, change), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_beyond_float16_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    stack = _rewrite_base(tiny, tmp_path, lambda t: t | {"model.norm.weight": torch.full((64,), 1e5)})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has values beyond float16's range"):
        merge_stack(stack, tmp_path / "merged", dtype="float16")
    merge_stack(stack, tmp_path / "merged", dtype="bfloat16")


def test_a_quantised_checkpoint_is_refused_as_base(tiny: Tiny, tmp_path: Path) -> None:
    load_tiny(tiny.base).model.save_pretrained(tmp_path / "base4")
    with pytest.raises(UserError, match="already quantized"):
        merge_stack(tiny.stack, tmp_path / "merged", base_model=str(tmp_path / "base4"))


def test_a_wrong_or_missing_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot find the base model"):
        merge_stack(tiny.stack, tmp_path / "merged", base_model=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="the stored weights differ"):
        merge_stack(tiny.stack, tmp_path / "merged", base_model=write_base(tmp_path / "other", seed=5))
    with pytest.raises(UserError, match="no safetensors weights"):
        merge_stack(tiny.stack, tmp_path / "merged", base_model=str(tiny.stack))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"base": "quantised"}])
def test_unknown_options_are_refused(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unknown"):
        merge_stack(tiny.stack, tmp_path / "merged", **options)


@pytest.mark.parametrize(
    ("recorded", "asked", "found"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "float32", torch.float32),
        (None, "auto", torch.float32),  # a stack of an earlier version: what this device would load it in
    ],
)
def test_a_base_is_merged_in_the_dtype_that_it_was_trained_in(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str | None, asked: str, found: torch.dtype
) -> None:
    folder = shutil.copytree(tiny.stack, tmp_path / "stack")
    manifest = json.loads((folder / "stack.json").read_text())
    (folder / "stack.json").write_text(json.dumps({**manifest, "load_dtype": recorded}))
    calls = spy(monkeypatch, merge, "MergedWeights")
    options: dict[str, Any] = {"base": "original", "dtype": "float16", "trust_remote_code": True}
    with pytest.raises(Seen):
        merge_stack(folder, tmp_path / "out", load_dtype=asked, device="cpu", **options)
    [((base, factors, *rest), _)] = calls
    assert str(base) == tiny.base and factors.folder == folder
    assert rest == ["original", "float16", found, torch.device("cpu"), True]
