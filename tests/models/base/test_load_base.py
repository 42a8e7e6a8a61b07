"""Loading a base: frozen, padded with EOS, quantized layout kept, and errors for bases that cannot be used."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from families import make_model
from safetensors.torch import load_file
from spies import spy
from tiny_llama import VOCABULARY, load_tiny, write_base
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
)

from tuna_peft.errors import UserError
from tuna_peft.models.base import dequantise, load, stored_weights
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.base.hub_files import CACHE
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
    with pytest.raises(UserError, match="only pytorch_model.bin"):
        load_tiny(str(folder), "none")


def test_every_argument_arrives_where_something_is_loaded(base_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def watch(kind: Any, result: Any = None) -> None:
        real = kind.from_pretrained

        def noted(path: str, **options: Any) -> Any:
            asked.setdefault(kind.__name__, (path, options))  # AutoTokenizer asks AutoConfig, too
            if kind is AutoModelForCausalLM:
                raise OSError("seen")
            return real(path, **options)

        monkeypatch.setattr(kind, "from_pretrained", noted)

    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        watch(kind)
    quantization = make_quantization_config("fp4")
    given = {"revision": "v9", "trust_remote_code": True}
    where = {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager"}
    assert {"model", "quantization_config", *given, *where} == set(inspect.signature(load_base).parameters)
    with pytest.raises(UserError, match="seen"):
        load_base(base_path, quantization_config=quantization, **given, **where)
    for name in ("AutoConfig", "AutoTokenizer"):
        assert asked[name] == (base_path, {**given, "local_files_only": False})
    path, options = asked["AutoModelForCausalLM"]
    assert path == base_path and options.pop("config").model_type == "llama"
    assert options.pop("quantization_config") is quantization
    assert options == {
        **given, "dtype": torch.bfloat16, "device_map": {"": torch.device("cpu")}, "use_safetensors": True,
        "attn_implementation": "eager", "output_loading_info": True,
    }  # fmt: skip


@pytest.mark.parametrize("source", ["the Hub", CACHE])
def test_a_model_of_the_hub_is_loaded_in_its_revision_and_from_the_cache_without_network(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    files = spy(monkeypatch, load, "hub_file", (Path("config.json"), source))
    configs = spy(monkeypatch, AutoConfig, "from_pretrained")
    with pytest.raises(UserError, match="Seen"):
        load.load_config_and_tokenizer("org/model", revision="v9", trust_remote_code=True)
    assert files == [(("org/model", "config.json", "v9"), {})]
    wanted = {"revision": "v9", "trust_remote_code": True, "local_files_only": source == CACHE}
    assert configs == [(("org/model",), wanted)]


def test_a_base_is_identified_by_the_weights_of_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = spy(monkeypatch, stored_weights, "cached_file", None)
    config = SimpleNamespace(_name_or_path="org/model", _commit_hash="c0ffee")
    identity = load.base_identity(SimpleNamespace(config=config))
    assert identity == {"model": "org/model", "revision": "c0ffee", "fingerprint": None}
    assert [args[1] for args, _ in files] == ["model.safetensors", "model.safetensors.index.json"]
    assert {options["revision"] for _, options in files} == {"c0ffee"}


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_setting_of_a_quantization(method: str, double_quant: bool) -> None:
    found = make_quantization_config(
        method, double_quant=double_quant, compute_dtype=torch.float16, storage_dtype=torch.bfloat16
    )
    assert found is not None and found.load_in_4bit and not found.load_in_8bit
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (method, double_quant)
    assert (found.bnb_4bit_compute_dtype, found.bnb_4bit_quant_storage) == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_device_and_dtype_are_chosen_for_the_gpu_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = {name: str(load.resolve_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")}
    assert found == {"auto": "cuda:3", "cuda": "cuda:3", "cuda:1": "cuda:1", "cpu": "cpu"}
    assert load.resolve_dtype("auto", torch.device("cuda", 3)) == dtype
    assert load.resolve_dtype("float32", torch.device("cuda", 3)) == torch.float32
    assert load.resolve_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert str(load.resolve_device("auto")) == "cpu"


@pytest.mark.parametrize(("rows", "pads_with"), [(VOCABULARY + 1, "<pad>"), (VOCABULARY, "</s>")])
def test_a_pad_token_without_a_row_in_the_model_is_replaced(
    base_path: str, tmp_path: Path, rows: int, pads_with: str
) -> None:
    folder = Path(shutil.copytree(base_path, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # its id is the size of the vocabulary before
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    assert load.load_config_and_tokenizer(str(folder))[1].pad_token == pads_with


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
