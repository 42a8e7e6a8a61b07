"""Reading and writing safetensors files one tensor at a time.

`safetensors.torch.save_file` wants all tensors of a file in memory. The format asks for less: eight bytes with the
header's length, a JSON header with every tensor's type, shape and byte range, then the bytes
(https://github.com/huggingface/safetensors#format). With the shapes known, the tensors can follow one by one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open

# Bytes per element of the types that a model's checkpoint holds.
ITEM_SIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorSpec:
    """Type (as safetensors names it) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return ITEM_SIZE[self.dtype] * math.prod(self.shape)


class SafetensorsReader:
    """The tensors of some safetensors files, by name.

    Attributes:
        specs: Type and shape of every tensor, in the order of the files.
    """

    def __init__(self, files: Iterable[str]):
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    view = tensors.get_slice(name)
                    self.specs[name] = TensorSpec(view.get_dtype(), tuple(view.get_shape()))
                    self._file_of[name] = file

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """Reads one tensor."""
        # Opened anew each time: an open file keeps every page that was read mapped into this process.
        with safe_open(self._file_of[name], framework="pt", device=str(device)) as tensors:
            return tensors.get_tensor(name)


def write_safetensors(
    path: str | os.PathLike[str], specs: Mapping[str, TensorSpec], load: Callable[[str], torch.Tensor]
) -> None:
    """Writes the tensors of `specs`, each taken from `load(name)` when its turn comes.

    Raises:
        OSError: The disk is full.
    """
    # Wide types first, so that every tensor starts at a multiple of its element size.
    names = sorted(specs, key=lambda name: -ITEM_SIZE[specs[name].dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + specs[name].nbytes
        header[name] = {
            "dtype": specs[name].dtype,
            "shape": list(specs[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = load(name).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            if data.nbytes != specs[name].nbytes:
                raise ValueError(f"{name}: {data.nbytes} bytes where {specs[name]} was announced")
            out.write(data.data)
