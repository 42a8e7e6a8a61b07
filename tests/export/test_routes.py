"""Every way to load a stack's result, on a small Qwen2 and on real models where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from llama_family import write_model
from peft import AutoPeftModelForCausalLM
from tiny_llama import PROMPTS, Tiny, write_stack
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuna_peft.errors import UserError
from tuna_peft.export.check import check_exports
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.compare_exports import compare_exports
from tuna_peft.export.divergence import fp32_computation, iter_logits
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.models.stack.files import AdapterStack

ADAPTERS = {"sft": {"r": 4, "target_modules": "all-linear"}, "ranking": {"r": 2, "target_modules": ["q_proj"]}}


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
def test_an_adapter_with_its_base_is_the_stack(tiny: Tiny, tmp_path: Path, method: str, load: type) -> None:
    """In plain transformers and PEFT, also where the base of training has been deleted."""
    stack = write_stack(tmp_path / "stack", tiny.base, method, double_quant=method == "nf4")
    report = combine_stack(stack, tmp_path / "both", with_base=True, device="cpu")
    assert report.nbytes >= sum(
        weights.stat().st_size - 2**15 for weights in (tmp_path / "both").glob("*.safetensors")
    )  # without headers
    batches = [torch.tensor([prompt]) for prompt in PROMPTS]
    live = AdapterStack.from_pretrained(stack, device="cpu").model
    loaded = load.from_pretrained(tmp_path / "both").eval()
    for expected, found in zip(iter_logits(live, batches), iter_logits(loaded, batches), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("method", ["int8", "none"])
def test_a_base_that_is_not_in_4_bits_is_not_written(tiny: Tiny, tmp_path: Path, method: str) -> None:
    stack = write_stack(tmp_path / "stack", tiny.base, method)
    with pytest.raises(UserError, match="not trained on a 4-bit base"):
        combine_stack(stack, tmp_path / "both", with_base=True)


def test_an_adapter_where_programs_do_not_quantize(tiny: Tiny, tmp_path: Path) -> None:
    """Against plain PEFT on the base in fp32."""
    adapter = combine_stack(tiny.stack, tmp_path / "combined").path
    found = check_exports(tiny.stack, [adapter], PROMPTS, device="cpu")
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    live = AdapterStack.from_pretrained(tiny.stack, device="cpu").model
    batches = [torch.tensor([prompt]) for prompt in PROMPTS]
    with fp32_computation(plain):
        logits = list(iter_logits(plain, batches))
    difference = max((a - b).abs().max().item() for a, b in zip(iter_logits(live, batches), logits, strict=True))
    measured = found[f"{adapter} on the unquantized base"]
    # The update is added in another order: some roundings of logits of at most 16.
    assert measured.logit_max == pytest.approx(difference, abs=1e-4)
    assert measured.kl_mean > 1e-2 and found[str(adapter)].kl_mean <= 1e-10


def test_every_export_of_a_qwen2(tmp_path: Path) -> None:
    """It has biases, a head of its own, and more embedding rows than tokens."""
    base = write_model(tmp_path / "base", "qwen2", tie_word_embeddings=False)
    rows = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().num_embeddings
    assert rows > len(AutoTokenizer.from_pretrained(base))
    check_routes(write_stack(tmp_path / "stack", str(base), **ADAPTERS), tmp_path, PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["SMOLLM2", "QWEN2"])
def test_every_export_of_a_real_model(tmp_path: Path, variable: str) -> None:
    """The variable names the folder of a model, for example of SmolLM2-135M-Instruct or Qwen2.5-0.5B."""
    if (base := os.environ.get(variable)) is None:
        pytest.skip(f"{variable} names no folder of a model")
    stack = write_stack(tmp_path / "stack", base, **ADAPTERS)
    prompt = AutoTokenizer.from_pretrained(base)("The capital of France is Paris, and the capital of Italy is Rome.")
    check_routes(stack, tmp_path, [prompt.input_ids])


def check_routes(stack: Path, folder: Path, prompts: list[list[int]]) -> None:
    """What must hold for every model, whatever the size of its rounding."""

    def write_gguf(model: Path, out: Path, types: tuple[str]) -> object:
        return export_gguf(model, out, types=types, stack_dir=stack, allow_lost_update=True)

    rows = {row.name: row for row in compare_exports(stack, prompts, folder, device="cpu", write_gguf=write_gguf)}
    assert not [row.reason for row in rows.values() if row.reason]
    kl = {name: row.divergence.kl_mean for name, row in rows.items() if row.divergence is not None}
    assert max(kl["adapter with its base"], kl["dequantized, float32"]) <= 1e-8
    assert kl["dequantized, bfloat16"] < kl["adapter, unquantized base"]
    assert kl["adapter, unquantized base"] == pytest.approx(kl["original, float32"], rel=1e-2)
    assert kl["dequantized, GGUF f16"] < kl["dequantized, GGUF q8_0"] < kl["dequantized, GGUF q4_0"]
