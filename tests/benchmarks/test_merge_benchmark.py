"""The merge benchmark: what it generates is a model with a stack, and its arms write the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rounding import assert_rounded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import merge  # noqa: E402
from tuna_peft.planning import storage  # noqa: E402


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_arms_write_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "SHARD", 50_000)
    size = merge.generate(tmp_path, "tiny", layers=1)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").num_parameters() * 2 == size
    written = {}
    for arm in merge.ARMS:
        figures = merge._run(arm, tmp_path, "cpu")
        assert figures["peak_rss_bytes"] >= figures["rss_before_bytes"] > 0
        written[arm] = tensors(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    for name, stored in tensors(tmp_path / "base").items():
        assert torch.equal(written["copy"][name], stored)
        # PEFT rounds once for each of two adapters; ours rounds once.
        assert_rounded(written["peft"][name], written["merge-original"][name], 3, dtype=torch.bfloat16)
        assert torch.equal(written["merge-original"][name], stored) is not name.endswith("_proj.weight")


def test_a_gguf_file_has_the_planned_size(tmp_path):
    merge.generate(tmp_path, "small", layers=1)
    merge._run("gguf-q4_0", tmp_path, "cpu")
    [file] = (tmp_path / "out").glob("*.gguf")
    head, layer = 32_000 * 512, 4 * 512 * 512 + 3 * 512 * 1408
    planned = storage.gguf_head("q4_0") * head + storage.GGUF["q4_0"] * (head + layer)
    assert planned < file.stat().st_size < planned + 2**20  # and a tokenizer


def test_figures_are_printed(capsys):
    figures = {
        "seconds": [2.0],
        "median_seconds": 2.0,
        "cpu_seconds": 3.0,
        "peak_rss_bytes": 10**9,
        "rss_before_bytes": 10**8,
    }
    run = {"shape": "7b", "layers": 2, "base_bytes": 10**9, "largest_tensor_bytes": 10**8}
    merge.print_run({**run, "arms": {"copy": {**figures, "median_seconds": 1.0}, "merge": figures}})
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == ["merge", "2.0", "3.0", "500", "0.50", "1.00", "0.10"]
