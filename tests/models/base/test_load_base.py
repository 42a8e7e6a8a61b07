"""Loading a base: frozen, padded with EOS, quantized layout kept, and errors for bases that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from families import make_model
from safetensors.torch import load_file
from tiny_llama import load_tiny, write_base
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, T5Config

from tuna_peft.errors import UserError
from tuna_peft.models.base import dequantise
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.base.load import load_base, make_quantization_config, resolve_model_path

AVX512_BF16 = bool(bnb.has_avx512bf16())


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "none"])
def test_every_method_loads_a_frozen_base_in_evaluation_mode(base_path: str, method: str) -> None:
    base = load_tiny(base_path, method)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    with torch.no_grad():
        assert base.model(input_ids=torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_a_tokenizer_without_padding_pads_with_eos(base_path: str) -> None:
    base = load_tiny(base_path, "none")
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == base.model.config.pad_token_id
    assert base.model.get_input_embeddings().num_embeddings == base.model.config.vocab_size  # not resized


def test_identity_names_the_weights_not_the_quantisation(base_path: str, tmp_path: Path) -> None:
    identity = load_tiny(base_path).identity
    assert identity["model"] == base_path
    assert identity["fingerprint"] == load_tiny(base_path, "none").identity["fingerprint"]
    moved = shutil.copytree(base_path, tmp_path / "moved")
    assert load_tiny(str(moved), "none").identity["fingerprint"] == identity["fingerprint"]
    other = load_tiny(write_base(tmp_path / "other", seed=9), "none")
    assert other.identity["fingerprint"] != identity["fingerprint"]


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor a Hub id"):
        load_base(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no built-in model"):
        resolve_model_path("builtin:unknown")


def test_a_model_without_sdpa_uses_eager_attention(base_path: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_path, tmp_path / "gemma2"))
    for old in folder.glob("*.safetensors"):
        old.unlink()
    make_model("gemma2", "eager").save_pretrained(folder)
    assert load_base(str(folder), device="cpu").model.config._attn_implementation == "eager"


def test_pickled_weights_are_not_read(base_path: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_path, tmp_path / "base"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load .*safetensors"):
        load_tiny(str(folder), "none")


def test_other_models_than_causal_lms_are_rejected(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        with pytest.raises(UserError, match="no causal language model"):
            load_base(str(tmp_path / name))


def test_a_tokenizer_without_eos_is_refused(base_path: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_path, tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no EOS token"):
        load_tiny(str(folder), "none")


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(UserError, match="unknown quantization 'nf5'"):
        make_quantization_config("nf5")


@pytest.mark.skipif(not AVX512_BF16, reason="bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only")
@pytest.mark.parametrize("double_quant", [True, False])
def test_evaluation_leaves_the_quantised_layout_alone(base_path: str, double_quant: bool) -> None:
    model = load_tiny(base_path, double_quant=double_quant).model
    layer = model.model.layers[0].mlp.down_proj
    before = dequantised_weight(layer).clone()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 9]]))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(dequantised_weight(layer), before)


@pytest.mark.skipif(not AVX512_BF16, reason="bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only")
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_repacked_layer_is_dequantized_correctly(base_path: str, double_quant: bool) -> None:
    """DESIGN, fact 7: without the guard a forward pass repacks the weight, and dequantizing it is silently wrong."""
    layer = load_tiny(base_path, double_quant=double_quant).model.model.layers[0].mlp.down_proj
    before = dequantised_weight(layer).clone()
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        layer(torch.randn(3, 128))
    state = layer.weight.quant_state
    assert state.packing_format_for_cpu
    scale = before.abs().max()
    assert (bnb.dequantize_4bit(layer.weight.data, state).float() - before).abs().max() > 0.5 * scale
    # The packed form keeps scales in bf16, so 2^-8 of each block's largest weight is what can come back.
    assert (dequantised_weight(layer) - before).abs().max() < 0.01 * scale
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_input_sizes_that_the_cpu_kernel_gets_wrong_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_base(tmp_path / "base", intermediate=96)
    monkeypatch.setattr(dequantise, "_dequantises_rows_of", lambda width: width % 64 == 0)
    with pytest.raises(UserError, match=r"down_proj' wrongly on this CPU: input size 96"):
        load_tiny(path)
    load_tiny(path, "int8")


@pytest.mark.parametrize("width", [64, 96, 172, 688])
def test_the_check_of_input_sizes_agrees_with_the_error(width: int) -> None:
    """The check passes exactly where the kernel's error is within NF4's."""
    torch.manual_seed(0)
    weight = torch.randn(64, width)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4")
    error = (bnb.dequantize_4bit(codes, state) - weight).abs().max() / weight.abs().max()
    assert (error < 0.16) == dequantise._dequantises_rows_of(width)


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_weights_are_loaded_directly_onto_a_gpu(base_path: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **given: object) -> None:
        raise OSError(f"asked for {given['device_map']} in {given['dtype']}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"asked for \{'': device\(type='cuda'\)\} in torch.float16"):
        load_base(base_path, quantization_config=make_quantization_config(method))


def test_a_missing_gpu_is_an_error(base_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device cuda: PyTorch sees no GPU here"):
        load_base(base_path, device="cuda")
