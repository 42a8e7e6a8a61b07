"""The weight of a quantized linear layer, and two defects of bitsandbytes 0.50 on CPUs that would return a wrong one.

`load_base` and `TunaTrainer` guard a model against both; merging and LoRA's backward pass read weights from here.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.utils.integrations import dequantize_module_weight

from tuna_peft.errors import UserError


def dequantised_weight(layer: torch.nn.Module) -> torch.Tensor:
    """The weight `(out, in)` of `layer` as training used it, dequantized.

    Supports `torch.nn.Linear` and bitsandbytes' `Linear4bit` and `Linear8bitLt`. A `Linear4bit` that bitsandbytes
    repacked for CPUs with AVX512-BF16 is restored to its storage layout first: dequantized as it is, it would silently
    give wrong values. Its block scales are then rounded to bf16, because the packed form keeps no more.
    """
    if isinstance(layer, Linear4bit):
        fix_4bit_weight_quant_state_from_module(layer)  # a weight gathered by FSDP2 has lost its state
    if isinstance(layer, Linear8bitLt):
        return dequantize_module_weight(layer).detach()
    # Not by PEFT's function, which `torch.compile` cannot trace: it replaces `layer.weight` on the way.
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    if getattr(state, "packing_format_for_cpu", False):
        _unpack(layer.weight, state)
    return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def keep_quantised_layout(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    The first forward pass without gradients rewrites `Linear4bit.weight` there, for a faster bf16 kernel. A later
    dequantization or merge would read the new layout as the old one, and evaluation would round differently from
    training. That forward pass also fails when the input size is not a multiple of the block size.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_exact_dequantisation(model: torch.nn.Module) -> None:
    """Rejects 4-bit layers that this CPU's kernel dequantizes with the scales of the wrong blocks.

    bitsandbytes 0.50's AVX512 kernel counts blocks per row, but quantization counts them over the whole weight: with
    an input size of 96, 160, 688, ... (a multiple of 16, not of 64) most weights are silently wrong.

    Raises:
        UserError: The model has such a layer; names the first.
    """
    rows: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            rows.setdefault(module.in_features, name)
    for width, name in rows.items():
        if not _dequantises_rows_of(width):
            raise UserError(
                f"bitsandbytes dequantizes {name!r} wrongly on this CPU: input size {width} is not a multiple of 64",
                fix="Load the base in int8 or unquantized, or use a GPU.",
            )


def _dequantises_rows_of(width: int) -> bool:
    """Tests the kernel: rows of `width` must give the same values as the same codes in rows of one block each."""
    codes, state = bnb.quantize_4bit(torch.linspace(-1, 1, 64 * width).view(64, width), quant_type="nf4")
    as_rows = bnb.dequantize_4bit(codes, state)
    state.shape = torch.Size((width, 64))
    return torch.equal(as_rows.view(-1), bnb.dequantize_4bit(codes, state).view(-1))


def _unpack(weight: Any, state: bnb.QuantState) -> None:
    weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not state.nested:
        # The inverse restores nested scales only; it leaves plain ones transposed, (in / block, out) in bf16.
        state.absmax = state.absmax.T.reshape(-1).float()
