"""GGUF files of merged models, read back by transformers' own loader and by the `gguf` package."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from llama_family import FAMILY, ROPE_GEMMA, ROPE_LLAMA3, ROPE_YARN, TEXTS, write_model
from rounding import assert_rounded, operations_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tuna_peft.errors import UserError
from tuna_peft.export.gguf import model as model_module
from tuna_peft.export.gguf.architecture import Architecture
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.export.gguf.tensors import reorder_heads

DATA = Path(__file__).parents[4] / "shared" / "data"
STORIES = DATA / "checkpoints" / "stories260K"
stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}: the real data is not here")


def values(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def load(folder: str | Path, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(folder: str | Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return load(folder, **options)(ids).logits


def ids_for(folder: str | Path) -> torch.Tensor:
    size = AutoConfig.from_pretrained(folder).vocab_size
    return torch.tensor([[(7 * i + 3) % size for i in range(40)]])


# transformers' loader drops RoPE scaling and a LLaMA's biases; see test_measured.py and test_llama_cpp.py.
@pytest.mark.parametrize("family", sorted(set(FAMILY) - {"llama-bias", "gemma3", "phi3", "phi4"}))
def test_transformers_reads_the_same_function(tmp_path: Path, family: str) -> None:
    source = write_model(tmp_path / "source", family)
    report = export_gguf(source, tmp_path / "out", types=["f32", "q8_0"])
    assert list(report.files) == ["source-F32.gguf", "source-Q8_0.gguf"]
    ids = ids_for(source)
    expected = logits(source, ids)
    exact, rounded = (logits(tmp_path / "out", ids, gguf_file=file) for file in report.files)
    assert_rounded(exact, expected, operations_of(load(source)))
    # Eight bits: not the same, and near.
    assert 1e-3 < (rounded - expected).abs().mean() / expected.std() < 0.1


@pytest.mark.parametrize("family", FAMILY)
def test_transformers_reads_the_same_tokenizer(tmp_path: Path, family: str) -> None:
    source = write_model(tmp_path / "source", family)
    [file] = export_gguf(source, tmp_path / "out", types=["f32"]).files
    own = AutoTokenizer.from_pretrained(source)
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file)
    for text in TEXTS:
        assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids, text
    assert read.chat_template == own.chat_template
    assert (read.bos_token, read.eos_token, read.unk_token) == ("<s>", "</s>", "<unk>")
    found = values(tmp_path / "out" / file)
    assert found["tokenizer.ggml.add_bos_token"] == (FAMILY[family][2] != "qwen2")
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert types["<|end|>"] == gguf.TokenType.CONTROL
    if family != "phi3":
        assert types["### Instruction:\n"] == gguf.TokenType.USER_DEFINED
    assert types[f"[PAD{len(own)}]"] == gguf.TokenType.UNUSED
    assert len(found["tokenizer.ggml.tokens"]) == AutoConfig.from_pretrained(source).vocab_size
    pre = {"llama3": "llama-bpe", "qwen2": "qwen2", "gpt2": "gpt-2", "phi4": "dbrx"}
    assert found["tokenizer.ggml.pre"] == pre.get(FAMILY[family][2], "default")


@pytest.mark.parametrize("source", ["builtin:pico-llama", pytest.param(str(STORIES), marks=stories)])
def test_real_models(tmp_path: Path, source: str) -> None:
    from tuna_peft.models.base.load import resolve_model_path

    folder = resolve_model_path(source)
    report = export_gguf(source, tmp_path / "out", types=["f32", "bf16", "q4_0"], name="real")
    ids = ids_for(folder)
    expected = logits(folder, ids)
    found = {file: logits(tmp_path / "out", ids, gguf_file=file) for file in report.files}
    assert_rounded(found["real-F32.gguf"], expected, operations_of(load(folder)))
    kls = {
        file: (expected.softmax(-1) * (expected.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean().item()
        for file, other in found.items()
    }
    # pico-LLaMA is stored in bf16: nothing is lost.
    # A divergence grows with the square of the differences, and bf16 has four bits more than Q4_0.
    assert 0 <= kls["real-BF16.gguf"] < kls["real-Q4_0.gguf"] / 16 < 0.5 / 16
    own, read = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="real-F32.gguf"),
    )
    for text in TEXTS:
        assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids, text


@pytest.mark.skipif(not (DATA / "tokenizers").is_dir(), reason=f"no {DATA}: the real data is not here")
def test_the_real_llama_tokenizer(tmp_path: Path) -> None:
    """32,000 pieces and 61,249 merges, which GGUF knows by their scores only."""
    source = write_model(tmp_path / "source", "llama", vocab_size=32000)
    shutil.copyfile(DATA / "tokenizers/llama2-7b/tokenizer.json", source / "tokenizer.json")
    [file] = export_gguf(source, tmp_path / "out", types=["q4_0"]).files
    own = AutoTokenizer.from_pretrained(source)
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file)
    with open(DATA / "ranked" / "alpaca_eval.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["instruction"] for line, _ in zip(lines, range(200), strict=False)]
    for text in texts:
        assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids, text


def test_rows_move_from_halves_to_alternating_positions() -> None:
    rows = torch.tensor([[0], [1], [2], [3], [10], [11], [12], [13]])  # two heads of four
    assert reorder_heads(rows, 2).flatten().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_llama3_rope_factors_worked_out_by_hand() -> None:
    folder_config = FAMILY["llama"][0](
        hidden_size=64, num_attention_heads=4, rope_parameters=ROPE_LLAMA3, max_position_embeddings=256
    )
    [(name, factors)] = Architecture.of(folder_config).rope_tensors().items()
    assert name == "rope_freqs.weight"
    expected = []
    for i in range(8):  # head size 16
        wavelength = 2 * math.pi * 10000 ** (2 * i / 16)
        smooth = (64 / wavelength - 1) / (4 - 1)
        expected.append(1.0 if wavelength < 64 / 4 else 4.0 if wavelength > 64 else 1 / ((1 - smooth) / 4 + smooth))
    assert_rounded(torch.from_numpy(factors), torch.tensor(expected), 8)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_formats_of_the_tensors(tmp_path: Path, type: str) -> None:
    source = write_model(tmp_path / "source", "llama", intermediate_size=80)  # no multiple of 32
    [file] = export_gguf(source, tmp_path / "out", types=[type]).files
    found = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "out" / file).items()}
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert found["blk.0.attn_q.weight"] == type.upper()
    assert found["blk.1.ffn_down.weight"] == ("F16" if type.startswith("q") else type.upper())
    assert found["output.weight"] == ("Q8_0" if type[1] in "45" else type.upper())
    assert set(values(tmp_path / "out" / file)) >= {"general.file_type", "general.quantization_version"}


def test_a_model_of_tied_embeddings_has_no_head(tmp_path: Path) -> None:
    [file] = export_gguf(write_model(tmp_path / "source", "llama-tied"), tmp_path / "out", types=["q4_0"]).files
    found = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "out" / file).items()}
    assert "output.weight" not in found
    assert found["token_embd.weight"] == "Q8_0"  # it is the head


def test_bf16_weights_pass_through_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuna_peft.export.gguf import tensors as tensors_module

    source = write_model(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    whole = export_gguf(source, tmp_path / "whole", types=["bf16", "q4_0"]).files
    monkeypatch.setattr(tensors_module, "_PART", 100)
    export_gguf(source, tmp_path / "parts", types=["bf16", "q4_0"])
    for file in whole:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    stored = load_file(source / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    data = tensors(tmp_path / "whole" / "source-BF16.gguf")["blk.1.ffn_up.weight"].data
    assert torch.equal(torch.from_numpy(data.copy()).view(torch.bfloat16).view(stored.shape), stored)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    [file] = export_gguf(write_model(tmp_path / "m", "mistral"), tmp_path / "out", types=["f32"]).files
    assert values(tmp_path / "out" / file)["llama.context_length"] == 128
    [file] = export_gguf(
        write_model(tmp_path / "q", "qwen2", sliding_window=64, use_sliding_window=False),
        tmp_path / "o",
        types=["f32"],
    ).files
    assert values(tmp_path / "o" / file)["qwen2.context_length"] == 256


def test_yarn_is_written_with_what_llama_cpp_needs(tmp_path: Path) -> None:
    [file] = export_gguf(write_model(tmp_path / "m", "qwen2", rope_parameters=ROPE_YARN), tmp_path / "o").files
    found = values(tmp_path / "o" / file)
    assert found["qwen2.rope.scaling.type"] == "yarn"
    assert found["qwen2.rope.scaling.factor"] == 4.0
    assert found["qwen2.rope.scaling.original_context_length"] == 64


def test_general_keys_are_those_of_the_converter(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", "llama")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\nbase_model: x/y\n---\n")
    [file] = export_gguf(source, tmp_path / "plain", types=["q8_0"]).files
    found = {key: value for key, value in values(tmp_path / "plain" / file).items() if key.startswith("general.")}
    parameters = sum(math.prod(tensor.shape) for tensor in load_file(source / "model.safetensors").values())
    assert found == {
        "general.architecture": "llama", "general.type": "model", "general.name": "m", "general.file_type": 7,
        "general.license": "apache-2.0", "general.languages": ["en", "de"], "general.quantization_version": 2,
        "general.size_label": f"{round(parameters / 1000)}K",
    }  # fmt: skip
    stack = {"base": {"model": "some-org/some-base-1B", "revision": "abc"}, "prompt": {}}
    (source / "tuna_export.json").write_text(json.dumps({"kind": "merged", "stack": stack}))
    [file] = export_gguf(source, tmp_path / "tuned", types=["q8_0"]).files
    found = values(tmp_path / "tuned" / file)
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/some-org/some-base-1B"
    assert "general.license" not in found  # that of the base is not at hand


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {**ROPE_YARN, "attention_factor": 1.0}}, "attention_factor"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"rope_parameters": ROPE_LLAMA3}, "'llama3' in a model of type 'qwen2'"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_act 'gelu'"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (
            "gemma3",
            {"rope_parameters": {**ROPE_GEMMA, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}},
            "RoPE of the sliding layers",
        ),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"vocab_size": 300}, "vocabulary mismatch: the tokenizer has"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    source = write_model(tmp_path / "source", family, **changes)
    with pytest.raises(UserError, match=message):
        export_gguf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def edit_config(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(source: Path, **changes: torch.Tensor | None) -> None:
    found = {**load_file(source / "model.safetensors"), **changes}
    save_file({name: value for name, value in found.items() if value is not None}, source / "model.safetensors")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refuses(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            export_gguf(source, tmp_path / "out", **options)

    source = write_model(tmp_path / "source", "llama")
    refuses("unknown GGUF type 'q4_2'\n.*llama-quantize", types=["Q4_2"])
    refuses("no GGUF type", types=[])
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(source, **{"model.embed_tokens.weight": embedding[:-3].clone()})
    refuses("vocabulary mismatch: 'model.embed_tokens.weight'")
    edit_tensors(source, **{"model.embed_tokens.weight": embedding, "score.weight": torch.zeros(2, 64)})
    refuses("no such model has, the first is 'score.weight'")
    edit_tensors(source, **{"score.weight": None, "model.norm.weight": None})
    refuses("has no 'model.norm.weight'")
    edit_tensors(source, **{"model.norm.weight": torch.ones(64), "lm_head.weight": embedding * 1e6})
    refuses("'lm_head.weight' has values beyond F16's range", types=["f16"])
    edit_config(source, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refuses("a model of type 'gpt2' cannot be written as GGUF")
    (source / "model.safetensors").unlink()
    refuses("no safetensors weights")
    shutil.rmtree(source)
    refuses("no model here")


@pytest.mark.parametrize(
    ("failure", "expected"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, ""), UserError)]
)
def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, expected: type[BaseException]
) -> None:
    source, out = write_model(tmp_path / "source", "llama"), tmp_path / "out"
    before = export_gguf(source, out).files
    convert, written = model_module.GGUFTensor.convert, []

    def fails(self: Any, *arguments: Any) -> Any:
        if len(written) == 8:
            raise failure
        written.append(self.name)
        return convert(self, *arguments)

    monkeypatch.setattr(model_module.GGUFTensor, "convert", fails)
    with pytest.raises(expected):
        export_gguf(source, out, types=["f32"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {path.name for path in out.glob("*.gguf")} == set(before)


def test_space_is_checked_first_and_sources_are_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source", "llama")
    with pytest.raises(UserError, match="would delete"):
        export_gguf(source, source)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 0))
    with pytest.raises(UserError, match="not enough disk space"):
        export_gguf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
