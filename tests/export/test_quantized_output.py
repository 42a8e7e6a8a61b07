"""A merged model quantized again: as transformers itself would have written it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import PROMPTS, Tiny, load_tiny, write_base, write_stack
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tuna_peft.export.base_weight import quantised_modules
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.merged_weights import QUANTIZED
from tuna_peft.models.base.dequantise import keep_quantised_layout


@pytest.mark.parametrize("method", ["nf4", "none"])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_it_is_what_transformers_makes_of_the_merged_model(
    tiny: Tiny, tmp_path: Path, method: str, dtype: str
) -> None:
    stack = write_stack(tmp_path / "stack", tiny.base, method)
    report = merge_stack(stack, tmp_path / "ours", dtype=dtype, max_shard_size="30KB")
    merge_stack(stack, tmp_path / "full", dtype="float32")
    assert report.files > 1
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=BitsAndBytesConfig(**QUANTIZED[dtype]), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = {name: x for file in (tmp_path / "ours").glob("*.safetensors") for name, x in load_file(file).items()}
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(ours) == {name for name in expected if not name.endswith("weight_format")}
    for name, tensor in ours.items():
        if name.endswith("quant_state.bitsandbytes__nf4"):
            states = [json.loads(bytes(state[name].tolist())) for state in (ours, expected)]
            assert states[0] == states[1] | {"dtype": "bfloat16"}
        elif tensor.is_floating_point() and not name.endswith(("absmax", "quant_map", "SCB")):
            assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_plain_transformers_loads_it(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    merge_stack(tiny.stack, tmp_path / "merged", dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    keep_quantised_layout(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert quantised_modules(model) == quantised_modules(load_tiny(tiny.base).model)
    assert model.generate(torch.tensor([PROMPTS[0]]), do_sample=False).shape[1] > len(PROMPTS[0])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_fill_no_block(tmp_path: Path, tied: bool) -> None:
    stack = write_stack(tmp_path / "stack", write_base(tmp_path / "base", intermediate=172, tied=tied), "none")
    merge_stack(stack, tmp_path / "merged", dtype="nf4")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    keep_quantised_layout(model)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([PROMPTS[0]])).logits.isfinite().all()
