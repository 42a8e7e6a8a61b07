"""Streamed files against the safetensors library itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuna_peft.export.safetensors_stream import SafetensorsReader, write_safetensors


def test_a_streamed_file_reads_as_a_saved_one(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "half16": torch.randn(7).to(torch.float16),
        "scalar": torch.tensor(2.5),
        "long": torch.arange(3),
        "byte": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "saved.safetensors")
    reader = SafetensorsReader([str(tmp_path / "saved.safetensors")])
    cpu = torch.device("cpu")
    write_safetensors(tmp_path / "streamed.safetensors", reader.specs, lambda name: reader.read(name, cpu))
    streamed = load_file(tmp_path / "streamed.safetensors")
    assert set(streamed) == set(tensors)
    for name, tensor in tensors.items():
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name], tensor), name


def test_tensors_are_asked_for_one_at_a_time_and_must_keep_their_promise(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, tmp_path / "saved.safetensors")
    reader = SafetensorsReader([str(tmp_path / "saved.safetensors")])
    with pytest.raises(ValueError, match="a: 4 bytes where"):
        write_safetensors(tmp_path / "out.safetensors", reader.specs, lambda name: torch.zeros(1))
