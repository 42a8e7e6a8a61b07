"""GGUF files are measured as other exports are, and each type is merged into the base that costs it less."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from llama_family import FAMILY, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, write_model
from rounding import stack_kl_bound
from tiny_llama import SFT, write_stack

from tuna_peft.errors import UserError
from tuna_peft.export.check import check_exports
from tuna_peft.export.gguf import llama_quantize
from tuna_peft.export.gguf.adapter import export_gguf_adapter
from tuna_peft.export.gguf.choose import export_gguf_of_stack
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.export.loading import BASE
from tuna_peft.export.merge import merge_stack

PROMPTS = [[(7 * i + 3) % 300 for i in range(40)], [(11 * i + 5) % 300 for i in range(100)]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter on a LLaMA in NF4."""
    folder = tmp_path_factory.mktemp("measured")
    return write_stack(folder / "stack", str(write_model(folder / "base", "llama", intermediate_size=128)), sft=SFT)


@pytest.mark.parametrize(
    ("family", "rope"),
    [*((family, None) for family in FAMILY), ("llama", ROPE_LLAMA3), ("llama", ROPE_LINEAR), ("qwen2", ROPE_YARN)],
)
def test_an_exact_file_is_measured_as_exact(tmp_path: Path, family: str, rope: dict | None) -> None:
    """Also where transformers' own loader would lose biases and RoPE scaling."""
    base = write_model(tmp_path / "base", family, **({"rope_parameters": rope} if rope else {}))
    stack = write_stack(tmp_path / "stack", str(base), "none", sft={"r": 4, "target_modules": "all-linear"})
    merged = merge_stack(stack, tmp_path / "merged", dtype="float32").path
    export_gguf(merged, tmp_path / "gguf", types=["f32", "q4_0"], name="m")
    found = check_exports(stack, [tmp_path / "gguf"], PROMPTS, device="cpu", dtype="float32")
    assert found.keys() == {BASE, *(str(tmp_path / "gguf" / f"m-{type}.gguf") for type in ("F32", "Q4_0"))}
    exact, rounded = (found[str(tmp_path / "gguf" / f"m-{type}.gguf")].kl_mean for type in ("F32", "Q4_0"))
    assert exact <= stack_kl_bound(stack) < 1e-3 < rounded


def test_each_type_is_merged_into_the_nearer_base(stack: Path, tmp_path: Path) -> None:
    report, measured = export_gguf_of_stack(stack, tmp_path / "out", PROMPTS, types=["q8_0", "q4_0"], name="m")
    record = json.loads((tmp_path / "out" / "tuna_export.json").read_text())
    assert list(report.files) == list(measured) == ["m-Q8_0.gguf", "m-Q4_0.gguf"]
    kept = check_exports(stack, [tmp_path / "out"], PROMPTS)
    for file, found in measured.items():
        nearer = min(found, key=lambda base: found[base].kl_mean)
        assert record["base"][file] == nearer
        assert kept[str(tmp_path / "out" / file)] == found[nearer]
    assert record["base"]["m-Q8_0.gguf"] == "dequantized"  # what it was trained on; 8 bits keep that
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./m-Q8_0.gguf\n")


def test_two_low_bit_grids_are_pointed_out(stack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for base in ("dequantized", "original"):
        merged = merge_stack(stack, tmp_path / base, base=base).path
        export_gguf(merged, tmp_path / "out", types=["q8_0", "q4_0"])
        assert ("GGUF q4_0: this model was merged into the dequantized base" in caplog.text) == (base == "dequantized")
        caplog.clear()


def test_what_cannot_be_measured_is_refused(stack: Path, tmp_path: Path) -> None:
    export_gguf_adapter(stack, tmp_path / "lora")
    with pytest.raises(UserError, match="a GGUF adapter cannot be measured without llama.cpp"):
        check_exports(stack, [tmp_path / "lora"], PROMPTS)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot read it"):
        check_exports(stack, [tmp_path / "broken.gguf"], PROMPTS)


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_k_quants_are_made_by_llama_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "m", "llama")
    put_on_path(tmp_path, monkeypatch, 'echo "$@" > "$(dirname "$0")/arguments"; cp "$3" "$4"')
    (tmp_path / "matrix").touch()
    report = export_gguf(source, tmp_path / "out", types=["Q4_K_M"], imatrix=tmp_path / "matrix")
    assert list(report.files) == ["m-Q4_K_M.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gguf")) == ["m-Q4_K_M.gguf"]
    option, matrix, read, written, type = (tmp_path / "bin" / "arguments").read_text().split()
    assert (option, matrix, type) == ("--imatrix", str(tmp_path / "matrix"), "Q4_K_M")
    assert read.endswith("/m-F32.gguf") and written.endswith("/m-Q4_K_M.gguf")
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./m-Q4_K_M.gguf\n")
    with pytest.raises(UserError, match="no effect on these types"):
        export_gguf(source, tmp_path / "out", types=["q8_0"], imatrix=tmp_path / "matrix")


def test_a_failing_llama_quantize_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "m", "llama")
    put_on_path(tmp_path, monkeypatch, 'echo "first"; echo "no importance matrix" >&2; exit 1')
    with pytest.raises(UserError, match="llama-quantize failed for iq3_m: no importance matrix"):
        export_gguf(source, tmp_path / "out", types=["iq3_m"])
    assert not (tmp_path / "out").exists()


def test_without_llama_quantize_it_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_quantize.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="not on PATH"):
        export_gguf(tmp_path / "absent", tmp_path / "out", types=["q4_k_m"])
