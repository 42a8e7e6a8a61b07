"""Computes the tensors of a merged model, one at a time, from the base's files and the stack's factors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from tuna_peft.errors import UserError
from tuna_peft.export.base_weight import (
    dequantise_4bit,
    dequantised,
    quantise_4bit,
    quantised_modules,
    require_linear,
    skeleton,
)
from tuna_peft.export.factors import Factors, StackFactors
from tuna_peft.export.kept_update import ModuleUpdate
from tuna_peft.export.safetensors_stream import FLOATS, SafetensorsReader, TensorSpec
from tuna_peft.limits import QUANTIZATION_BLOCK, SCALES_BLOCK
from tuna_peft.models.base.load import safetensors_files

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

_ROWS = 1 << 22  # elements added up in fp32 at a time
_STATE_BYTES = 256  # bitsandbytes' JSON of a weight is padded to this, because sizes must be known in advance


class MergedWeights:
    """The tensors of the merged model's files.

    Args:
        folder: The base's folder.
        factors: The stack's factors.
        base: `dequantized` or `original`, see `merge_stack`.
        dtype: `bfloat16`, `float16`, `float32` or `nf4`.
        load_dtype: Dtype in which the base was loaded for training.
        device: Device that quantises and adds.

    Attributes:
        groups: Types and shapes of all tensors, by the stored weight from which they are computed.
        updates: By module, as far as computed: how much of the update is kept; for `float32` nothing is measured.

    Raises:
        UserError: A layout in which a weight is not found, or of another shape.
    """

    groups: dict[str, dict[str, TensorSpec]]
    updates: dict[str, ModuleUpdate]

    def __init__(
        self,
        folder: Path,
        factors: StackFactors,
        base: str,
        dtype: str,
        load_dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool,
    ):
        self._source = SafetensorsReader(safetensors_files(str(folder)))
        self._factors, self._device, self._load_dtype = factors, device, load_dtype
        self._as_trained = base == "dequantized"
        self._quantization = factors.manifest.quantization if self._as_trained else None
        model = skeleton(folder, self._quantization, trust_remote_code=trust_remote_code)
        self._quantised = quantised_modules(model)
        changed = [*factors.shapes, *sorted(self._quantised)]
        require_linear(model, changed)
        self._require_weights(changed, folder)
        self._requantised: set[str] = set()
        if dtype == "nf4":
            self._requantised = quantised_modules(skeleton(folder, NF4, trust_remote_code=trust_remote_code))
            # All other weights are 16-bit: in training's dtype if that was 16-bit, else bfloat16.
            dtype = "float16" if load_dtype == torch.float16 else "bfloat16"
        self.dtype = dtype
        self.groups = {name: self._specs(name, spec) for name, spec in self._source.specs.items()}
        self.updates = {}

    def config_changes(self) -> dict[str, Any]:
        """What differs from the base in `config.json`."""
        if not self._requantised:
            return {"dtype": self.dtype}
        config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=getattr(torch, self.dtype))
        return {"dtype": self.dtype, "quantization_config": json.loads(config.to_json_string(use_diff=False))}

    def make(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of the group `name`.

        Raises:
            UserError: Values beyond float16's range.
        """
        module = name.removesuffix(".weight")
        weight = self._source.read(name, self._device)
        if not weight.is_floating_point():
            return {name: weight}
        if module in self._quantised and self._quantization is not None:
            weight = dequantised(weight, self._quantization, self._load_dtype)
        elif self._as_trained:
            weight = weight.to(self._load_dtype)
        factors = self._factors.of(module) if module in self._factors.shapes else None
        if module in self._requantised:
            return self._requantise(name, weight.float(), factors)
        rounded = self._sum(module, weight, factors, getattr(torch, self.dtype))
        if self.dtype == "float16" and not rounded.isfinite().all():
            raise UserError(f"{name!r} has values beyond float16's range", fix="Use bfloat16 or float32.")
        return {name: rounded}

    def _specs(self, name: str, stored: TensorSpec) -> dict[str, TensorSpec]:
        if name.removesuffix(".weight") in self._requantised:
            blocks = -(-math.prod(stored.shape) // QUANTIZATION_BLOCK)
            return {
                f"{name}.nested_absmax": TensorSpec("F32", (-(-blocks // SCALES_BLOCK),)),
                f"{name}.nested_quant_map": TensorSpec("F32", (256,)),
                f"{name}.quant_map": TensorSpec("F32", (16,)),
                f"{name}.absmax": TensorSpec("U8", (blocks,)),
                name: TensorSpec("U8", (-(-math.prod(stored.shape) // 2), 1)),
                f"{name}.quant_state.bitsandbytes__nf4": TensorSpec("U8", (_state_bytes(math.prod(stored.shape)),)),
            }
        return {name: TensorSpec(DTYPES[self.dtype] if stored.dtype in FLOATS else stored.dtype, stored.shape)}

    def _requantise(self, name: str, base: torch.Tensor, factors: Factors | None) -> dict[str, torch.Tensor]:
        """NF4 as bitsandbytes serialises it (`QuantState.as_dict(packed=True)`)."""
        module = name.removesuffix(".weight")
        weight = self._sum(module, base, factors, torch.float32)
        codes, state = quantise_4bit(weight, "nf4", double_quant=True, dtype=torch.float32)
        if factors is not None:
            # The base is quantized, too, so that only the update makes a difference.
            codes_of_base = quantise_4bit(base, "nf4", double_quant=True, dtype=torch.float32)
            self.updates[module] = ModuleUpdate()
            self.updates[module].add(dequantise_4bit(codes, state), dequantise_4bit(*codes_of_base), weight - base)
        state.dtype = getattr(torch, self.dtype)
        packed = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        key = f"{name}.quant_state.bitsandbytes__nf4"
        filled = torch.full((_state_bytes(weight.numel()),), ord(" "), dtype=torch.uint8)
        filled[: packed[key].numel()] = packed[key]
        return {**packed, key: filled, name: codes[: -(-weight.numel() // 2)].view(-1, 1)}

    def _sum(self, module: str, weight: torch.Tensor, factors: Factors | None, dtype: torch.dtype) -> torch.Tensor:
        """`weight + B A`, added up in fp32 and rounded to `dtype` once; `updates` gets the effect of the rounding.

        A few rows at a time, so that fp32 needs little memory.
        """
        if factors is None:
            return weight.to(dtype)
        a, b = factors.a.to(weight.device), factors.b.to(weight.device)
        result = torch.empty_like(weight, dtype=dtype)
        measured = ModuleUpdate()
        rows = max(1, _ROWS // weight.shape[1])
        for part, own_b, own_rows in zip(weight.split(rows), b.split(rows), result.split(rows), strict=True):
            update = own_b @ a
            own_rows.copy_(part + update)
            if dtype != torch.float32:
                measured.add(own_rows.float(), part.to(dtype).float(), update)
        if dtype != torch.float32:
            self.updates[module] = measured
        return result

    def _require_weights(self, modules: list[str], folder: Path) -> None:
        for module in modules:
            spec = self._source.specs.get(module + ".weight")
            if spec is None:
                raise UserError(
                    f"the checkpoint stores no weight for {module!r} under its own name (fused or renamed weights?)",
                    where=str(folder),
                    fix="Save the base again with transformers' save_pretrained, or publish the combined adapter.",
                )
            shape = self._factors.shapes.get(module)
            if shape and spec.shape != (shape.outputs, shape.inputs):
                raise UserError(
                    f"the adapters' {module!r} is {(shape.outputs, shape.inputs)}, the base's {spec.shape}",
                    where=str(folder),
                    fix="Merge into the base that the stack was trained on.",
                )


def _state_bytes(elements: int) -> int:
    """The size of a weight's JSON: it brings all that belongs to the weight to a multiple of eight bytes."""
    blocks = -(-elements // QUANTIZATION_BLOCK)
    others = 4 * -(-blocks // SCALES_BLOCK) + blocks + -(-elements // 2)
    return _STATE_BYTES + -others % 8
