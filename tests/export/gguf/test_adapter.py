"""GGUF adapters: what llama.cpp adds, alpha / rank * B A on reordered rows, is what the stack adds."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from llama_family import write_model
from peft import LoraConfig
from rounding import assert_rounded
from safetensors.torch import load_file
from tiny_llama import RANKING, SFT, Tiny, load_tiny, stack_on, write_stack

from tuna_peft.errors import UserError
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.gguf.adapter import export_gguf_adapter
from tuna_peft.export.gguf.tensors import reorder_heads
from tuna_peft.export.merge import merge_stack
from tuna_peft.models.stack.adapters import save_adapter

NAMES = {
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

RANKS = 8 + 4  # the products that one entry of the update sums up


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """What the file adds to each weight, by transformers' names, worked out as llama.cpp does it."""
    reader = gguf.GGUFReader(file)
    [alpha] = reader.fields["adapter.lora.alpha"].parts[-1]
    found = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    result = {}
    for layer in range(2):
        for own, theirs in NAMES.items():
            key = own.format(layer) + ".weight"
            if f"{key}.lora_a" in found:
                a, b = found[f"{key}.lora_a"], found[f"{key}.lora_b"]
                result[theirs.format(layer) + ".weight"] = float(alpha) / b.shape[1] * b @ a
    return result


def merged_deltas(stack: Path, base: str, out: Path) -> dict[str, torch.Tensor]:
    merge_stack(stack, out, dtype="float32", base="original")
    merged, stored = load_file(out / "model.safetensors"), load_file(Path(base) / "model.safetensors")
    found = {name: merged[name].double() - stored[name].double() for name in merged}
    return {
        name: reorder_heads(delta, 4) if "q_proj" in name else delta for name, delta in found.items() if delta.any()
    }


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype=torch.float32) -> None:
    assert set(found) == set(expected)
    for name, delta in expected.items():
        # In fp32, the update is the difference of two weights, with an error of their size.
        scale = 1.0 if dtype == torch.float32 else delta
        assert_rounded(found[name], delta, RANKS, scale=scale, dtype=dtype, name=name)


@pytest.mark.parametrize("type", ["f32", "f16"])
def test_a_stack_of_mixed_ranks_and_scalings(tiny: Tiny, tmp_path: Path, type: str) -> None:
    report = export_gguf_adapter(tiny.stack, tmp_path / "out", type=type, name="mine")
    assert list(report.files) == [f"mine-LORA-{type.upper()}.gguf"]
    file = tmp_path / "out" / f"mine-LORA-{type.upper()}.gguf"
    expected = merged_deltas(tiny.stack, tiny.base, tmp_path / "merged")
    require_same(deltas(file), expected, {"f32": torch.float32, "f16": torch.float16}[type])
    fields = gguf.GGUFReader(file).fields
    assert [fields[f"{key}.type"].contents() for key in ("general", "adapter")] == ["adapter", "lora"]
    assert fields["general.architecture"].contents() == "llama"


def test_a_combined_adapter_and_a_part_of_the_stack(tiny: Tiny, tmp_path: Path) -> None:
    combine_stack(tiny.stack, tmp_path / "combined")
    whole = export_gguf_adapter(tiny.stack, tmp_path / "whole", name="x")
    export_gguf_adapter(tmp_path / "combined", tmp_path / "out", name="x")
    [file] = whole.files
    require_same(deltas(tmp_path / "out" / file), deltas(tmp_path / "whole" / file))
    export_gguf_adapter(tiny.stack, tmp_path / "part", name="x", upto="sft")
    assert len(deltas(tmp_path / "part" / file)) == 2 * 4
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./base.gguf\nADAPTER ./{file}\n")
    assert r"### Instruction:\n" in modelfile and r"\n\n### Response:" in modelfile  # the prompt came along


def test_a_rank_stabilised_adapter_of_plain_peft(tiny: Tiny, tmp_path: Path) -> None:
    """GGUF's alpha / rank would be half of alpha / sqrt(rank) at rank 4."""
    live = stack_on(load_tiny(tiny.base, "none"), only=RANKING)
    save_adapter(live, "only", tmp_path / "adapter")
    [file] = export_gguf_adapter(tmp_path / "adapter", tmp_path / "out").files
    layer = dict(live.named_modules())["base_model.model.model.layers.0.self_attn.v_proj"]
    expected = 6 / 2 * layer.lora_B["only"].weight.double() @ layer.lora_A["only"].weight.double()
    found = deltas(tmp_path / "out" / file)["model.layers.0.self_attn.v_proj.weight"]
    assert_rounded(found, expected.detach(), RANKS)


def test_parts_of_a_stack_and_unfit_bases_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    def refuses(message: str, folder: Path, **options: str) -> None:
        with pytest.raises(UserError, match=message):
            export_gguf_adapter(folder, tmp_path / "out", **options)

    refuses("one adapter of a stack", tiny.stack / "ranking")
    refuses("no stack.json", tmp_path)
    refuses("cannot be 'q4_0'", tiny.stack, type="q4_0")
    refuses("cannot read the configuration of the base", tiny.stack, base_model=str(tmp_path / "absent"))
    refuses("no adapter 'absent'", tiny.stack, upto="absent")
    broken = tmp_path / "stack"
    shutil.copytree(tiny.stack, broken)
    (broken / "sft" / "adapter_config.json").write_text("{}")
    refuses("its hash differs", broken)
    sft = LoraConfig.from_pretrained(str(tiny.stack / "sft"))
    dora = LoraConfig(r=sft.r, lora_alpha=sft.lora_alpha, use_dora=True, base_model_name_or_path=tiny.base)
    shutil.copytree(tiny.stack / "sft", tmp_path / "dora")
    dora.save_pretrained(str(tmp_path / "dora"))
    refuses("DoRA", tmp_path / "dora")


def test_a_file_says_that_it_is_an_adapter_of_its_base(tiny: Tiny, tmp_path: Path) -> None:
    [file] = export_gguf_adapter(tiny.stack, tmp_path / "out", name="mine").files
    fields = gguf.GGUFReader(tmp_path / "out" / file).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["general.name"].contents() == "mine"
    assert "general.base_model.count" not in fields  # the base is a folder of this machine


def test_queries_of_other_families_keep_their_order(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "qwen2")
    stack = write_stack(tmp_path / "stack", str(base), "none", sft=SFT)
    [file] = export_gguf_adapter(stack, tmp_path / "out").files
    tensors = load_file(stack / "sft" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    expected = 20 / 8 * tensors[key.format("B")].double() @ tensors[key.format("A")].double()
    found = deltas(tmp_path / "out" / file)["model.layers.0.self_attn.q_proj.weight"]
    assert_rounded(found, expected, RANKS)
