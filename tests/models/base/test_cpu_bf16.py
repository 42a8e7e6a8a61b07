"""`auto` on a CPU: bf16 where a flag promises it and a measurement confirms it. Both are injected here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tuna_peft import limits
from tuna_peft.models.base import cpu_bf16 as module
from tuna_peft.models.base.cpu_bf16 import GAIN, cpu_bf16, measured_gain
from tuna_peft.models.base.load import load_base, make_quantization_config, resolve_dtype
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.folder import DTYPE, RunDirectory

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A function that gives this process a CPU with some flags, whose bf16 products are `gain` times as fast."""

    def give(flags, gain=GAIN):
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu avx2 {flags}\n\nprocessor\t: 1\n")
        monkeypatch.setattr(limits, "_ROOT", tmp_path)
        monkeypatch.setattr(module, "measured_gain", lambda width: gain)

    return give


@pytest.mark.parametrize(
    ("flags", "gain", "hidden", "dtype", "reason"),
    [
        (
            "amx_bf16 avx512_bf16",
            8.0,
            576,
            torch.bfloat16,
            "has amx_bf16, and its bf16 products take 0.12 of the time",
        ),
        ("avx512_bf16", GAIN, None, torch.bfloat16, "has avx512_bf16"),
        ("amx_bf16", GAIN - 0.01, 4096, torch.float32, "too little a gain"),
        ("avx512f amx_tile", 8.0, 4096, torch.float32, "neither amx_bf16 nor avx512_bf16"),
        ("amx_bf16", 8.0, 511, torch.float32, "hidden size 511"),
    ],
)
def test_auto(cpu, flags, gain, hidden, dtype, reason):
    cpu(flags, gain)
    assert resolve_dtype("auto", CPU, hidden) == dtype
    assert reason in cpu_bf16(hidden).reason
    assert resolve_dtype("float32", CPU, hidden) == torch.float32  # what is asked for is done


def test_a_system_without_cpuinfo_has_no_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    assert resolve_dtype("auto", CPU) == torch.float32


def test_products_are_timed_once_for_each_width():
    measured_gain.cache_clear()
    assert measured_gain(16) == measured_gain(16) > 0
    assert measured_gain.cache_info().misses == 1


def test_the_base_is_loaded_in_it(cpu, base_path, monkeypatch):
    cpu("amx_bf16")
    small = load_base(base_path, device="cpu")  # of hidden size 64
    monkeypatch.setattr(module, "SMALL_MODEL", 64)
    large = load_base(base_path, device="cpu", quantization_config=make_quantization_config("nf4"))
    assert (small.model.dtype, large.model.dtype) == (torch.float32, torch.bfloat16)
    assert large.model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_run_keeps_the_dtype_that_it_began_with(cpu, tmp_path, caplog):
    large = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=2048))
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "base": {"model": "m", "device": "cpu"},
            "stages": [{"name": "a", "type": "sft", "data": {"path": "d"}}],
        }
    )

    def dtype(folder):
        with caplog.at_level("INFO", "tuna_peft"), RunDirectory(folder, recipe) as run:
            run.fix_dtype(large)
            run.save("evaluation/base/x.json", {})  # a result: the run has begun
            return run.recipe.base.dtype

    cpu("amx_bf16", 8.0)
    assert dtype(tmp_path / "run") == "bfloat16"
    assert "computing in bfloat16 (the CPU has amx_bf16" in caplog.text
    cpu("sse")
    assert dtype(tmp_path / "run") == "bfloat16"
    assert "began in bfloat16 and stays in it; a new run would compute in float32 here" in caplog.text
    assert dtype(tmp_path / "other") == "float32"
    (tmp_path / "other" / DTYPE).unlink()  # as the version before left it
    cpu("amx_bf16", 8.0)
    assert dtype(tmp_path / "other") == "float32"
