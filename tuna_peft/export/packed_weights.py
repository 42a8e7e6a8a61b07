"""Quantized weights as bitsandbytes stores them in files, and a stack's 4-bit base in that form, as in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, int8_vectorwise_dequant, int8_vectorwise_quant
from transformers import BitsAndBytesConfig

from tuna_peft.errors import UserError
from tuna_peft.export.base_weight import dequantise_4bit, quantise_4bit, quantised_modules, skeleton
from tuna_peft.export.safetensors_stream import DTYPES, FLOATS, SafetensorsReader, TensorSpec
from tuna_peft.limits import QUANTIZATION_BLOCK, SCALES_BLOCK
from tuna_peft.models.base.stored_weights import safetensors_files

_STATE_BYTES = 256  # bitsandbytes' JSON of a weight is padded to this, because sizes must be known in advance


class PackedBase:
    """The tensors of a base as in training: linear layers in 4 bits, all others in the dtype of training.

    Args:
        folder: The base's folder.
        quantization: The manifest's bitsandbytes settings.
        load_dtype: Dtype in which the base was loaded for training.
        device: Device that quantizes.

    Attributes:
        groups: Types and shapes of all tensors, by the stored weight from which they are computed.

    Raises:
        UserError: The base was not quantized to 4 bits.
    """

    groups: dict[str, dict[str, TensorSpec]]

    def __init__(
        self,
        folder: Path,
        quantization: dict[str, Any] | None,
        load_dtype: str,
        device: torch.device,
    ):
        if not (quantization and quantization.get("load_in_4bit")):
            raise UserError(
                "the stack was not trained on a 4-bit base", fix="Combine without the base, or merge the stack."
            )
        self._quantization, self._load_dtype, self._device = quantization, load_dtype, device
        self._source = SafetensorsReader(safetensors_files(str(folder)))
        self._modules = quantised_modules(skeleton(folder, quantization))
        self.groups = {
            name: packed_specs(name, spec.shape, quantization)
            if self._is_packed(name)
            # transformers keeps what it finds beside 4-bit weights, whatever config.json says.
            else {name: TensorSpec(DTYPES[load_dtype] if spec.dtype in FLOATS else spec.dtype, spec.shape)}
            for name, spec in self._source.specs.items()
        }

    def config_changes(self) -> dict[str, Any]:
        """What differs from the base in `config.json`."""
        config = quantization_config(self._quantization, self._load_dtype)
        return {"dtype": self._load_dtype, "quantization_config": config}

    def make(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of the group `name`."""
        weight = self._source.read(name, self._device)
        dtype: torch.dtype = getattr(torch, self._load_dtype)
        if not self._is_packed(name):
            return {name: weight.to(dtype) if weight.is_floating_point() else weight}
        return packed(name, *quantise_4bit(weight, self._quantization, dtype))

    def _is_packed(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._modules


def quantization_config(quantization: dict[str, Any], compute_dtype: str) -> dict[str, Any]:
    """The section of `config.json` for weights in these bitsandbytes settings."""
    settings = dict(quantization)
    if settings.get("load_in_4bit"):
        settings["bnb_4bit_compute_dtype"] = getattr(torch, compute_dtype)
    config = BitsAndBytesConfig(**settings)
    result: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return result


def packed_specs(name: str, shape: tuple[int, ...], quantization: dict[str, Any]) -> dict[str, TensorSpec]:
    """Types and shapes of the tensors that `quantised` returns for a weight `(out, in)`."""
    if quantization.get("load_in_8bit"):
        return {name: TensorSpec("I8", shape), _row_scales_name(name): TensorSpec("F32", shape[:1])}
    blocks = -(-math.prod(shape) // QUANTIZATION_BLOCK)
    nested = quantization["bnb_4bit_use_double_quant"]
    specs = {
        f"{name}.nested_absmax": TensorSpec("F32", (-(-blocks // SCALES_BLOCK),)),
        f"{name}.nested_quant_map": TensorSpec("F32", (256,)),
    }
    specs = {
        **(specs if nested else {}),
        f"{name}.quant_map": TensorSpec("F32", (16,)),
        f"{name}.absmax": TensorSpec("U8" if nested else "F32", (blocks,)),
        name: TensorSpec("U8", (-(-math.prod(shape) // 2), 1)),
    }
    # The JSON brings all that belongs to the weight to a multiple of eight bytes.
    state = _STATE_BYTES + -sum(spec.nbytes for spec in specs.values()) % 8
    return {**specs, _state_name(name, quantization["bnb_4bit_quant_type"]): TensorSpec("U8", (state,))}


def quantised(
    name: str, weight: torch.Tensor, quantization: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantizes a weight `(out, in)`: its tensors in a file, which are to be dequantized to `dtype`, and their value.

    Returns:
        The tensors by name, and the weight that they stand for, in fp32.
    """
    if quantization.get("load_in_8bit"):
        codes, row_scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        # bitsandbytes also writes `weight_format`, always 0, and reads files without it.
        return {name: codes, _row_scales_name(name): row_scales}, int8_vectorwise_dequant(codes, row_scales)
    codes, state = quantise_4bit(weight, quantization, torch.float32)
    rounded = dequantise_4bit(codes, state)
    state.dtype = dtype
    return packed(name, codes, state), rounded


def packed(name: str, codes: torch.Tensor, state: QuantState) -> dict[str, torch.Tensor]:
    """The result of `quantise_4bit` as bitsandbytes serializes it (`QuantState.as_dict(packed=True)`)."""
    tensors = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    elements = state.shape.numel()
    tensors[name] = codes[: -(-elements // 2)].view(-1, 1)
    key = _state_name(name, state.quant_type)
    text = tensors.pop(key)
    size = _STATE_BYTES + -sum(tensor.nbytes for tensor in tensors.values()) % 8
    tensors[key] = torch.full((size,), ord(" "), dtype=torch.uint8)
    tensors[key][: text.numel()] = text
    return tensors


def _row_scales_name(name: str) -> str:
    return name.removesuffix("weight") + "SCB"


def _state_name(name: str, quant_type: str) -> str:
    return f"{name}.quant_state.bitsandbytes__{quant_type}"
