"""Reading and writing safetensors files one tensor at a time.

`safetensors.torch.save_file` wants all tensors of a file in memory. The format asks for less: eight bytes with the
header's length, a JSON header with every tensor's type, shape and byte range, then the bytes
(https://github.com/huggingface/safetensors#format). With the shapes known, the tensors can follow one by one.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tuna_peft.files import unreadable_is_a_user_error

# Bytes per element of the types that a model's checkpoint holds.
ITEM_SIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
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
            with (
                unreadable_is_a_user_error(file, "weights of a model"),
                safe_open(file, framework="pt") as tensors,
            ):
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    view = tensors.get_slice(name)
                    self.specs[name] = TensorSpec(view.get_dtype(), tuple(view.get_shape()))
                    self._file_of[name] = file

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """Reads one tensor."""
        # Opened for each read, because an open file keeps all pages that were read mapped into this process.
        with safe_open(self._file_of[name], framework="pt", device=str(device)) as tensors:
            return tensors.get_tensor(name)


def write_safetensors(
    path: str | os.PathLike[str],
    groups: Mapping[str, Mapping[str, TensorSpec]],
    load: Callable[[str], Mapping[str, torch.Tensor]],
    report: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes groups of tensors, each computed by `load(group)` in its turn; resumes an interrupted write.

    Until it is whole the file is called `<path>.part`. File systems make a file longer once the data is there, so its
    length says which groups are written; the rest is truncated and written again.

    Args:
        path: The file.
        groups: Type and shape of every tensor, by group; a group is what is made together.
        load: The tensors of a group, by name.
        report: Is told how many bytes have been written, also those that were there before.

    Raises:
        ValueError: A tensor is not what was announced, or a group would leave the next one unaligned.
        OSError: The disk is full.
    """
    part = Path(f"{os.fspath(path)}.part")
    order, head, ends = _layout(groups)
    with open(part, "a+b") as out, _Flusher(out.fileno()) as disk:
        out.seek(0)
        if out.read(len(head)) != head:
            out.truncate(0)
            out.write(head)
        written = bisect.bisect_right(ends, out.seek(0, os.SEEK_END) - len(head))
        end = ends[written - 1] if written else 0
        out.truncate(len(head) + end)
        report(end)
        for group in order[written:]:
            tensors = load(group)
            for name in _widest_first(groups[group]):
                spec = groups[group][name]
                data = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                if data.nbytes != spec.nbytes:
                    raise ValueError(f"{name}: {data.nbytes} bytes where {spec} was announced")
                out.write(data.data)
                disk.wrote(data.nbytes)
                report(data.nbytes)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)


class _Flusher:
    """Starts writing to disk while the next tensors are computed; otherwise it would begin at the end of the file."""

    EVERY = 1 << 28  # bytes

    def __init__(self, file: int):
        self._file, self._bytes = file, 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()  # before the file is closed

    def wrote(self, nbytes: int) -> None:
        """Counts bytes, and raises errors of earlier writes."""
        self._bytes += nbytes
        if self._bytes >= self.EVERY:
            if self._pending is not None:
                self._pending.result()
            self._pending, self._bytes = self._thread.submit(os.fsync, self._file), 0


def _layout(groups: Mapping[str, Mapping[str, TensorSpec]]) -> tuple[list[str], bytes, list[int]]:
    """The groups in the order of the file, the file's head, and where the data of each group ends."""
    # Every tensor starts at a multiple of its element size when the groups whose size is a multiple of 8 come first,
    # then those of 4, 2 and 1, and in a group the wide types.
    alignment = {group: math.gcd(8, sum(spec.nbytes for spec in specs.values())) for group, specs in groups.items()}
    order = sorted(groups, key=lambda group: -alignment[group])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, ends = 0, []
    for group in order:
        for name in _widest_first(groups[group]):
            spec = groups[group][name]
            if end % ITEM_SIZE[spec.dtype]:
                raise ValueError(f"{name}: its group's size, or that of one before, would leave it unaligned")
            start, end = end, end + spec.nbytes
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        ends.append(end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text, ends


def _widest_first(specs: Mapping[str, TensorSpec]) -> list[str]:
    return sorted(specs, key=lambda name: -ITEM_SIZE[specs[name].dtype])
