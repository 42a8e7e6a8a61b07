"""The weights of a GGUF file: names, order of rows, and number formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format

from tuna_peft.errors import UserError
from tuna_peft.export.gguf.architecture import Architecture

# What the `gguf` package can write, by the usual names, with the file type that marks the whole file.
TYPES = {
    "f32": (Format.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Format.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Format.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Format.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Format.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Format.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Format.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Format.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
BELOW_8_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")
# Stored by old checkpoints although it follows from the configuration.
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias")
_PART = 1 << 22  # values converted at a time: 16 MB in fp32


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor to be written.

    Attributes:
        name: In the file.
        source: transformers' name (of an adapter: the module's); None for what is computed.
        shape: `(out, in)` or `(size,)`, as in torch.
        format: Its number format.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    format: Format

    @property
    def nbytes(self) -> int:
        """Size of its data in the file, padded as the writer pads it."""
        return gguf.GGUFWriter.ggml_pad(math.prod(self._stored_shape()) * self._dtype().itemsize, 32)

    def _stored_shape(self) -> tuple[int, ...]:
        if self._dtype() != np.uint8:
            return self.shape
        return gguf.quant_shape_to_byte_shape(self.shape, self.format)

    def _dtype(self) -> np.dtype:
        return np.dtype({Format.F32: np.float32, Format.F16: np.float16}.get(self.format, np.uint8))

    def announce(self, writer: gguf.GGUFWriter) -> None:
        """Tells the writer what will come; tensors follow in the order in which they were announced."""
        shape = self._stored_shape()
        size = math.prod(shape) * self._dtype().itemsize
        writer.add_tensor_info(self.name, shape, self._dtype(), size, raw_dtype=self.format)

    def convert(self, values: torch.Tensor, rotated_heads: int | None = None, offset: float = 0.0) -> np.ndarray:
        """The tensor's data as it is stored.

        Args:
            values: The weight in torch's layout.
            rotated_heads: See `Architecture.rotated_heads`.
            offset: See `Architecture.stored_offset`.

        Raises:
            UserError: A value beyond fp16's range in a format that stores fp16.
        """
        if rotated_heads is not None:
            values = reorder_heads(values, rotated_heads)
        rows = values.reshape(-1, values.shape[-1])
        out = np.empty((rows.shape[0], self._stored_shape()[-1]), dtype=self._dtype())
        step = max(1, _PART // rows.shape[1])
        for start in range(0, len(rows), step):
            part = (rows[start : start + step].float() + offset).numpy()
            # Scales of blocks are fp16 too; a block of an 8-bit format divides its largest value by 127 and so on.
            limit = 65504 * {Format.F16: 1, Format.Q8_0: 127, Format.Q4_0: 8, Format.Q5_0: 16}.get(self.format, 1)
            if self.format not in (Format.F32, Format.BF16) and np.abs(part).max(initial=0) > limit:
                raise UserError(
                    f"{self.source!r} has values beyond {self.format.name}'s range", fix="Use bf16 or f32."
                )
            out[start : start + step] = gguf.quantize(part, self.format)
        return out.reshape(self._stored_shape())


def reorder_heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (of a weight, a bias, or a LoRA B) from halves of a head to alternating positions."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def tensor_name(architecture: Architecture, source: str) -> str:
    """llama.cpp's name for a tensor.

    Raises:
        UserError: It has none.
    """
    names = gguf.get_tensor_name_map(architecture.arch, architecture.config.num_hidden_layers)
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UserError(
            f"llama.cpp's {architecture.name!r} has no place for {source!r}", fix="Serve the model itself."
        )
    return name


def plan_tensors(
    architecture: Architecture,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
    type: str,
) -> list[GGUFTensor]:
    """What a file of `type` holds, in its order.

    Matrices get the type's format, vectors (norms, biases) stay fp32. A matrix whose rows are no whole number of
    blocks of 32 is kept in fp16, as llama.cpp's own converter does it. Below 8 bits the head is kept in 8 (llama.cpp
    uses 6 there, which Python cannot write); with tied embeddings that is the embedding.

    Args:
        architecture: The model.
        expected: Shapes by transformers' names, of the model as its configuration describes it.
        stored: Shapes of what the checkpoint has.
        type: One of `TYPES`.

    Raises:
        UserError: A tensor that is missing, of another shape, or unknown.
    """
    tied = architecture.config.tie_word_embeddings
    wanted = {name: shape for name, shape in expected.items() if not (tied and name == "lm_head.weight")}
    _require_complete(wanted, stored)
    extra = sorted(name for name in stored if name not in expected and not name.endswith(_DERIVED))
    if extra:
        raise UserError(
            f"{len(extra)} tensors that no such model has, the first is {extra[0]!r}",
            fix="Export a merged model, not a quantized or partial checkpoint.",
        )
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    plan = [
        GGUFTensor(tensor_name(architecture, name), name, shape, _format(shape, type, name == head))
        for name, shape in wanted.items()
    ]
    computed = architecture.rope_tensors().items()
    return [*(GGUFTensor(name, None, factors.shape, Format.F32) for name, factors in computed), *plan]


def unaligned(plan: Iterable[GGUFTensor], type: str) -> list[GGUFTensor]:
    """The tensors that had to be kept in fp16 because their rows are no whole number of blocks."""
    wanted = TYPES[type][0]
    return [tensor for tensor in plan if tensor.format is Format.F16 and wanted is not Format.F16]


def _format(shape: tuple[int, ...], type: str, is_head: bool) -> Format:
    wanted = TYPES[type][0]
    if len(shape) == 1:
        return Format.F32
    if is_head and type in BELOW_8_BITS:
        wanted = Format.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else Format.F16


def _require_complete(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in stored:
            raise UserError(f"the checkpoint has no {name!r}", fix="Merge or copy the model again.")
        if stored[name] != shape:
            what = "vocabulary" if name.endswith(("embed_tokens.weight", "lm_head.weight")) else "shape"
            raise UserError(
                f"{what} mismatch: {name!r} is {stored[name]}, by config.json {shape}",
                fix="config.json and the weights are of different models.",
            )
