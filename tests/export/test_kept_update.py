"""A merge reports how much of the adapters' update is left after rounding, and refuses to write the untrained base."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFReader
from llama_family import write_model
from rounding import rounding
from safetensors.torch import load_file, save_file
from tiny_llama import Tiny, load_tiny, stack_on
from transformers import AutoConfig, AutoModelForCausalLM

from tuna_peft.errors import UserError
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.export.gguf.tensors import reorder_heads
from tuna_peft.export.kept_update import KeptUpdate, ModuleUpdate
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.merged_weights import QUANTIZED
from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.stack.files import save_stack

Q4_0 = gguf.GGMLQuantizationType.Q4_0
ADAPTER = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def write_scaled_stack(folder: Path, base: str, scale: float, method: str = "nf4") -> Path:
    """A stack of one random adapter whose update is `scale` times as large."""
    model = stack_on(load_tiny(base, method), sft=ADAPTER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
    save_stack(model, folder, {"template": "alpaca"})
    return folder


@pytest.mark.parametrize(("dtype", "scale"), [("nf4", 30.0), ("int8", 1.0), ("bfloat16", 0.05), ("float16", 0.05)])
def test_each_module_agrees_with_the_files(tiny: Tiny, tmp_path: Path, dtype: str, scale: float) -> None:
    stack = write_scaled_stack(tmp_path / "stack", tiny.base, scale)
    unchanged = write_scaled_stack(tmp_path / "unchanged", tiny.base, 0.0)
    report = merge_stack(stack, tmp_path / "merged", dtype=dtype, allow_lost_update=True)
    for source, kind in ((stack, "full"), (unchanged, "full-base")):
        merge_stack(source, tmp_path / kind, dtype="float32")
    merge_stack(unchanged, tmp_path / "base", dtype=dtype)
    found = json.loads((tmp_path / "merged" / "kept_update.json").read_text())
    assert found.keys() == StackFactors(stack).shapes.keys()

    def weight(kind: str, module: str) -> torch.Tensor:
        if dtype in QUANTIZED and not kind.startswith("full"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
            return dequantised_weight(model.get_submodule(module)).double()
        return load_file(tmp_path / kind / "model.safetensors")[f"{module}.weight"].double()

    kept = squared = 0.0
    shares = {}
    for module, sums in found.items():
        update = weight("full", module) - weight("full-base", module)
        share = (((weight("merged", module) - weight("base", module)) * update).sum() / update.square().sum()).item()
        # The update is the difference of fp32 weights here, so each entry is off by the rounding of a weight; in the
        # sum these errors have random signs. NF4 weights are dequantized to bf16 where they are loaded: 8 bits.
        bound = 2**-8 if dtype in QUANTIZED else rounding(1, weight("full", module)) / update.norm().item()
        assert sums["kept"] / sums["squared"] == pytest.approx(share, rel=0, abs=bound), module
        kept, squared = kept + sums["kept"], squared + sums["squared"]
        shares[module] = sums["kept"] / sums["squared"]
    assert report.kept_update is not None
    assert report.kept_update.share == pytest.approx(kept / squared)
    assert (report.kept_update.worst, report.kept_update.worst_module) == min((s, m) for m, s in shares.items())
    record = json.loads((tmp_path / "merged" / "tuna_export.json").read_text())
    assert record["kept_update"]["share"] == report.kept_update.share


def test_nf4_that_returns_the_base_is_refused(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stack = write_scaled_stack(tmp_path / "stack", tiny.base, 0.01)
    with pytest.raises(UserError, match=r"undo the training: of nf4 weights, -?[0-3]\.\d% of the update"):
        merge_stack(stack, tmp_path / "merged", dtype="nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["stack"]
    report = merge_stack(stack, tmp_path / "merged", dtype="nf4", allow_lost_update=True)
    assert report.kept_update is not None and abs(report.kept_update.share) < 0.05
    assert "nf4 weights: " in caplog.text
    merge_stack(stack, tmp_path / "half", dtype="float16")  # 11 bits are enough for it


def test_16_bits_can_lose_an_update_too(tiny: Tiny, tmp_path: Path) -> None:
    """On a base in bf16, a change of less than half of bf16's step disappears."""
    stack = write_scaled_stack(tmp_path / "stack", tiny.base, 1e-4, "none")
    with pytest.raises(UserError, match="of bfloat16 weights, "):
        merge_stack(stack, tmp_path / "merged", load_dtype="bfloat16")
    assert merge_stack(stack, tmp_path / "merged", dtype="float32").kept_update is None


def test_a_stack_that_changes_nothing_loses_nothing(tiny: Tiny, tmp_path: Path) -> None:
    stack = write_scaled_stack(tmp_path / "stack", tiny.base, 0.0)
    assert merge_stack(stack, tmp_path / "merged", dtype="nf4").kept_update is None


@pytest.mark.parametrize(
    ("kept", "worst", "raises", "warns"),
    [(0.49, 0.4, True, False), (0.51, 0.4, False, True), (0.95, 0.89, False, True), (0.95, 0.9, False, False)],
)
def test_bounds(kept: float, worst: float, raises: bool, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    found = KeptUpdate(kept, worst, "m")
    if raises:
        with pytest.raises(UserError):
            found.check("x", "fix", allow_lost_update=False)
        found.check("x", "fix", allow_lost_update=True)
        assert "x: 49.0% of the update is kept; 40.0% in the worst module, m. fix" in caplog.text
    else:
        found.check("x", "fix", allow_lost_update=False)
        assert bool(caplog.text) == warns


def test_modules_without_an_update_do_not_count() -> None:
    modules = {"a": ModuleUpdate(1.0, 2.0), "b": ModuleUpdate(0.0, 0.0), "c": ModuleUpdate(6.0, 6.0)}
    assert KeptUpdate.over(modules) == KeptUpdate(7 / 8, 0.5, "a")
    assert KeptUpdate.over({"b": modules["b"]}) is None


def test_gguf_files_are_measured_and_refused(tmp_path: Path) -> None:
    base = str(write_model(tmp_path / "base", "llama", intermediate_size=128))
    file = Path(base) / "model.safetensors"
    on_the_grid = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(x.float().numpy(), Q4_0), Q4_0)) if x.ndim == 2 else x
        for name, x in load_file(file).items()
    }
    save_file(on_the_grid, file, metadata={"format": "pt"})
    stack = write_scaled_stack(tmp_path / "stack", base, 1e-3, "none")
    merged = merge_stack(stack, tmp_path / "merged", dtype="float32").path
    with pytest.raises(UserError, match=r"undo the training: of m-Q4_0\.gguf, "):
        export_gguf(merged, tmp_path / "out", types=["q4_0"], name="m", stack_dir=stack)
    assert not (tmp_path / "out").exists()
    options = {"name": "m", "stack_dir": stack, "allow_lost_update": True}
    report = export_gguf(merged, tmp_path / "out", types=["f32", "q4_0"], **options)
    kept = report.kept_update
    assert kept["m-F32.gguf"] is None
    assert kept["m-Q4_0.gguf"] is not None and abs(kept["m-Q4_0.gguf"].share) < 0.05
    record = json.loads((tmp_path / "out" / "tuna_export.json").read_text())["kept_update"]
    assert record == {"m-F32.gguf": None, "m-Q4_0.gguf": asdict(kept["m-Q4_0.gguf"])}


def test_gguf_agrees_with_the_file(tmp_path: Path) -> None:
    """Also for q, whose rows are stored in another order."""
    base = str(write_model(tmp_path / "base", "llama", intermediate_size=128))
    stack, unchanged = (write_scaled_stack(tmp_path / name, base, scale) for name, scale in (("s", 1.0), ("u", 0.0)))
    for source in (stack, unchanged):
        merge_stack(source, tmp_path / f"{source.name}-full", dtype="float32")
    report = export_gguf(tmp_path / "s-full", tmp_path / "s-q", types=["q8_0"], name="m", stack_dir=stack)
    export_gguf(tmp_path / "u-full", tmp_path / "u-q", types=["q8_0"], name="m")
    merged, plain = (
        {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
        for file in (tmp_path / "s-q" / "m-Q8_0.gguf", tmp_path / "u-q" / "m-Q8_0.gguf")
    )
    factors, kept, squared, largest = StackFactors(stack), 0.0, 0.0, 0.0
    for module, name in (("q_proj", "attn_q"), ("down_proj", "ffn_down")):
        for layer in range(2):
            found = factors.of(f"model.layers.{layer}.{'self_attn' if module == 'q_proj' else 'mlp'}.{module}")
            update = found.b @ found.a
            if module == "q_proj":
                update = reorder_heads(update, AutoConfig.from_pretrained(base).num_attention_heads)
            change = torch.from_numpy(merged[f"blk.{layer}.{name}.weight"] - plain[f"blk.{layer}.{name}.weight"])
            kept += (change.double() * update).sum().item()
            squared += update.double().square().sum().item()
            step = float(plain[f"blk.{layer}.{name}.weight"].max()) / 127
            largest = max(largest, step * update.abs().max().item())
    assert report.kept_update["m-Q8_0.gguf"] is not None
    # Subtracting the update from the merged weight gives the base to the rounding of fp32: about one in 30,000 values
    # (2 * 127 * eps) rounds to the next of Q8_0's steps, and here are 24,576 of them.
    assert report.kept_update["m-Q8_0.gguf"].share == pytest.approx(kept / squared, rel=0, abs=20 * largest / squared)
