"""Streamed files against the safetensors library itself."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuna_peft.export import safetensors_stream
from tuna_peft.export.safetensors_stream import ITEM_SIZE, SafetensorsReader, TensorSpec, write_safetensors


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
    groups = {name: {name: spec} for name, spec in reader.specs.items()}
    write_safetensors(tmp_path / "streamed.safetensors", groups, lambda name: {name: reader.read(name, cpu)})
    streamed = load_file(tmp_path / "streamed.safetensors")
    assert set(streamed) == set(tensors)
    for name, tensor in tensors.items():
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name], tensor), name


def test_tensors_are_asked_for_one_at_a_time_and_must_keep_their_promise(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, tmp_path / "saved.safetensors")
    reader = SafetensorsReader([str(tmp_path / "saved.safetensors")])
    with pytest.raises(ValueError, match="a: 4 bytes where"):
        groups = {name: {name: spec} for name, spec in reader.specs.items()}
        write_safetensors(tmp_path / "out.safetensors", groups, lambda name: {name: torch.zeros(1)})
    assert not (tmp_path / "out.safetensors").exists()


GROUPS = {
    "x": {"x.scale": TensorSpec("F32", (3,)), "x.codes": TensorSpec("U8", (4,))},
    "odd": {"odd": TensorSpec("BF16", (3,))},
    "y": {"y.codes": TensorSpec("U8", (12,)), "y.scale": TensorSpec("F32", (1,))},
    "empty": {"empty": TensorSpec("F32", (0,))},
}


def _values(group: str) -> dict[str, torch.Tensor]:
    dtypes = {"F32": torch.float32, "U8": torch.uint8, "BF16": torch.bfloat16}
    return {
        name: torch.arange(spec.nbytes, dtype=torch.uint8).view(dtypes[spec.dtype]).view(spec.shape)
        for name, spec in GROUPS[group].items()
    }


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "out.safetensors", GROUPS, _values)
    data = (tmp_path / "out.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for group in GROUPS.values():
        for name, spec in group.items():
            assert header[name]["data_offsets"][0] % ITEM_SIZE[spec.dtype] == 0, name
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value) for group in GROUPS for name, value in _values(group).items())
    odd = {i: {f"{i}.codes": TensorSpec("U8", (3,)), f"{i}.scale": TensorSpec("F32", (1,))} for i in "ab"}
    with pytest.raises(ValueError, match="b.scale: its group's size, or that of one before, would leave it unaligned"):
        write_safetensors(tmp_path / "bad.safetensors", odd, _values)


@pytest.mark.parametrize(("cut", "missing"), [(0, 1), (1, 3), (16, 3), (17, 4), (200, 4), (10_000, 4)])
def test_an_interrupted_file_goes_on_at_the_last_whole_group(tmp_path: Path, cut: int, missing: int) -> None:
    path = tmp_path / "out.safetensors"
    write_safetensors(path, GROUPS, _values)
    whole = path.read_bytes()
    path.unlink()
    made: list[str] = []

    def stops_at_the_third(group: str) -> dict[str, torch.Tensor]:
        made.append(group)
        if len(made) == 3:
            raise KeyboardInterrupt
        return _values(group)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, GROUPS, stops_at_the_third)
    assert not path.exists()
    part = tmp_path / "out.safetensors.part"
    length = part.stat().st_size
    with open(part, "r+b") as file:
        file.truncate(max(0, length - cut))  # as if it had been killed earlier
    before, written = len(made), []
    write_safetensors(path, GROUPS, lambda group: made.append(group) or _values(group), written.append)
    assert path.read_bytes() == whole
    assert not part.exists()
    assert len(made) - before == missing  # x and y were there, 16 bytes each; the empty tensor takes none
    assert sum(written) == sum(spec.nbytes for group in GROUPS.values() for spec in group.values())


def test_a_disk_that_fails_while_tensors_are_made_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream._Flusher, "EVERY", 1)
    write_safetensors(tmp_path / "fine.safetensors", GROUPS, _values)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    made: list[str] = []
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "out.safetensors", GROUPS, lambda group: made.append(group) or _values(group))
    assert len(made) < len(GROUPS)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_left_of_another_file_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors.part").write_bytes(b"something else" * 100)
    write_safetensors(tmp_path / "out.safetensors", GROUPS, _values)
    assert set(load_file(tmp_path / "out.safetensors")) == {name for group in GROUPS.values() for name in group}


def test_the_whole_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(file: int) -> None:
        fsync(file)
        events.append(("flushed", os.fstat(file).st_size))

    def renamed(source: Path, target: Path) -> None:
        events.append(("renamed", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_safetensors(tmp_path / "x", {"a": {"a": TensorSpec("F32", (3,))}}, lambda group: {"a": torch.ones(3)})
    size = (tmp_path / "x").stat().st_size
    assert events == [("flushed", size), ("renamed", size)]
