"""Computes the tensors of a merged model, one at a time, from the base's files and the stack's factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tuna_peft.errors import UserError
from tuna_peft.export.base_weight import dequantised, quantised_modules, require_linear, skeleton
from tuna_peft.export.factors import Factors, StackFactors
from tuna_peft.export.kept_update import ModuleUpdate
from tuna_peft.export.packed_weights import packed_specs, quantised, quantization_config
from tuna_peft.export.safetensors_stream import DTYPES, FLOATS, SafetensorsReader, TensorSpec
from tuna_peft.models.base.stored_weights import safetensors_files

# bitsandbytes' settings of the dtypes in which a merged model is quantized again.
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}

_ROWS = 1 << 20  # elements added up in fp32 at a time: more of them leave the processor's cache between two operations
_MEASURED = 8  # the update's share is measured in every eighth of these parts, because that is slower than adding


class MergedWeights:
    """The tensors of the merged model's files.

    Args:
        folder: The base's folder.
        factors: The stack's factors.
        base: `dequantized` or `original`, see `merge_stack`.
        dtype: `bfloat16`, `float16`, `float32`, `nf4` or `int8`.
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
        self._requantization = QUANTIZED.get(dtype, {})
        if self._requantization:
            quantized = skeleton(folder, self._requantization, trust_remote_code=trust_remote_code)
            self._requantised = quantised_modules(quantized)
            # All other weights are 16-bit: in training's dtype if that was 16-bit, else bfloat16.
            dtype = "float16" if load_dtype == torch.float16 else "bfloat16"
        self.dtype = dtype
        self.groups = {name: self._specs(name, spec) for name, spec in self._source.specs.items()}
        self.updates = {}

    def config_changes(self) -> dict[str, Any]:
        """What differs from the base in `config.json`."""
        if not self._requantised:
            return {"dtype": self.dtype}
        return {"dtype": self.dtype, "quantization_config": quantization_config(self._requantization, self.dtype)}

    def not_measured(self) -> list[str]:
        """The groups of `updates` that are not computed yet."""
        is_measured = self.dtype != "float32"
        return [f"{module}.weight" for module in self._factors.shapes if is_measured and module not in self.updates]

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
            return packed_specs(name, stored.shape, self._requantization)
        return {name: TensorSpec(DTYPES[self.dtype] if stored.dtype in FLOATS else stored.dtype, stored.shape)}

    def _requantise(self, name: str, base: torch.Tensor, factors: Factors | None) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        weight = self._sum(module, base, factors, torch.float32)
        tensors, rounded = quantised(name, weight, self._requantization, getattr(torch, self.dtype))
        if factors is not None:
            # The base is quantized, too, so that only the update makes a difference.
            _, rounded_base = quantised(name, base, self._requantization, getattr(torch, self.dtype))
            self.updates[module] = ModuleUpdate()
            self.updates[module].add(rounded, rounded_base, weight - base)
        return tensors

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
        parts = zip(weight.split(rows), b.split(rows), result.split(rows), strict=True)
        for index, (part, own_b, own_rows) in enumerate(parts):
            own_rows.copy_(part.to(torch.float32, copy=True).addmm_(own_b, a))
            if dtype != torch.float32 and index % _MEASURED == 0:
                measured.add(own_rows.float(), part.to(dtype).float(), own_b @ a)
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
