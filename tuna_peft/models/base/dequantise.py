"""The weight behind a quantised linear layer, and two ways in which bitsandbytes on a CPU loses it."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.utils.integrations import dequantize_module_weight

from tuna_peft.errors import UserError


def dequantised_weight(layer: torch.nn.Module) -> torch.Tensor:
    """The weight `(out, in)` that `layer` multiplies with, as training saw it.

    Serves `torch.nn.Linear` and bitsandbytes' `Linear4bit` and `Linear8bitLt`. A `Linear4bit` that bitsandbytes
    repacked for CPUs with AVX512-BF16 is brought back to its storage layout first: read as it is, it dequantises to
    garbage without a word. Its block scales come back rounded to bf16, which is all that the packed form keeps.
    """
    if isinstance(layer, Linear4bit):
        fix_4bit_weight_quant_state_from_module(layer)  # a weight that FSDP2 gathered is bare codes
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        _unpack(layer.weight, state)
    return dequantize_module_weight(layer).detach()


def keep_quantised_layout(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There, the first forward without gradients rewrites `Linear4bit.weight` for a faster bf16 kernel; a later
    dequantisation or merge would read the new layout as the old one, and evaluation would round differently from
    training. Rows that are no multiple of the block size make that forward fail.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_exact_dequantisation(model: torch.nn.Module) -> None:
    """Refuses 4-bit layers whose rows this CPU's kernel dequantises with the scales of other blocks.

    bitsandbytes 0.50's AVX512 kernel counts blocks per row, where quantisation counts them over the whole weight:
    with rows of 96, 160, 688.. (a multiple of 16 that is none of 64) most weights are silently wrong.

    Raises:
        UserError: The first such layer.
    """
    rows: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            rows.setdefault(module.in_features, name)
    for width, name in rows.items():
        if not _dequantises_rows_of(width):
            raise UserError(
                f"bitsandbytes dequantises {name!r} wrongly on this CPU: its input size {width} is no multiple of 64",
                fix="Load the base in int8 or unquantised, or use a GPU.",
            )


def _dequantises_rows_of(width: int) -> bool:
    """Whether the CPU kernel gives rows of `width` the values that it gives them as rows of one block each."""
    codes, state = bnb.quantize_4bit(torch.linspace(-1, 1, 64 * width).view(64, width), quant_type="nf4")
    as_rows = bnb.dequantize_4bit(codes, state)
    state.shape = torch.Size((width, 64))
    return torch.equal(as_rows.view(-1), bnb.dequantize_4bit(codes, state).view(-1))


def _unpack(weight: Any, state: bnb.QuantState) -> None:
    weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not state.nested:
        # The inverse restores nested scales only; plain ones it leaves transposed, (in / block, out) in bf16.
        state.absmax = state.absmax.T.reshape(-1).float()
