"""Reproduces the weights that a stack was trained on: quantised and dequantised as when loaded. For `merge`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from tuna_peft.errors import UserError
from tuna_peft.limits import QUANTIZATION_BLOCK, SCALES_BLOCK

_PART = 1 << 14  # blocks quantised at a time: a million weights


def skeleton(folder: Path, quantization: dict[str, Any] | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base without weights (on the meta device), its layers replaced as quantised loading replaces them.

    transformers' own selection runs, so head, tied weights and modules kept in fp32 are left out as in loading.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**quantization), pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
    return model


def quantised_modules(model: PreTrainedModel) -> set[str]:
    """Names of the layers that bitsandbytes quantises."""
    return {name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}


def require_linear(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Checks that every module is a linear layer with a weight `(out, in)` of its own.

    Raises:
        UserError: A module is missing or not a linear layer; names the first one.
    """
    layers = dict(model.named_modules())
    for name in modules:
        layer = layers.get(name)
        layer = getattr(layer, "base_layer", layer)  # below an adapter
        kind = getattr(layer, "source_cls", type(layer))  # bitsandbytes layers remember what they replaced
        if layer is None or not issubclass(kind, nn.Linear):
            what = "has no module" if layer is None else f"has a {kind.__name__}, not a Linear, at"
            raise UserError(f"the base {what} {name!r}", fix="Only stacks on plain linear layers can be merged.")


def dequantised(weight: torch.Tensor, quantization: dict[str, Any], load_dtype: torch.dtype) -> torch.Tensor:
    """What the quantised layer multiplies with: `weight` quantised and dequantised.

    Args:
        weight: The stored weight `(out, in)`, on the device to quantise on.
        quantization: The manifest's bitsandbytes settings.
        load_dtype: The dtype that the live model is loaded with: 4-bit codes are made from it and dequantised to it.

    Returns:
        `(out, in)` in `load_dtype` for 4 bits, in fp32 for 8 bits (int8 products are scaled in fp32).
    """
    if quantization.get("load_in_8bit"):
        codes, row_scales, _ = bnb.int8_vectorwise_quant(weight.to(load_dtype).to(torch.float16).contiguous())
        return bnb.int8_vectorwise_dequant(codes, row_scales)
    return dequantise_4bit(*quantise_4bit(weight, quantization, load_dtype))


def quantise_4bit(
    weight: torch.Tensor, quantization: dict[str, Any], dtype: torch.dtype
) -> tuple[torch.Tensor, bnb.QuantState]:
    """Codes and scales of a weight, bit by bit those of `bnb.quantize_4bit`, with a tenth of its memory.

    Args:
        weight: `(out, in)`; codes are made from it in `dtype`.
        quantization: bitsandbytes' settings: `nf4` or `fp4`; with double quantization the scales are kept to 8 bits,
            around their mean.
        dtype: What the codes will be dequantised to.

    Returns:
        The codes, two a byte, the last block filled up with zeros, and bitsandbytes' description of them.
    """
    quant_type: str = quantization["bnb_4bit_quant_type"]
    # As rows of one block: blocks run over the whole weight, and some CPU kernels miscount them in other rows (see
    # `require_exact_dequantisation`). Zeros that fill the last block change neither its scale nor its codes.
    flat, missing = weight.reshape(-1), -weight.numel() % QUANTIZATION_BLOCK
    blocks = (nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, QUANTIZATION_BLOCK)
    # In parts, because bitsandbytes needs five times the memory of an fp32 weight to quantise it.
    quantise = _quantise_on_cpu if weight.device.type == "cpu" else _quantise
    parts = [quantise(part.to(dtype), quant_type) for part in blocks.split(_PART)]
    codes = torch.cat([codes for codes, _ in parts])
    scales = torch.cat([scales for _, scales in parts])
    state = bnb.QuantState(
        absmax=scales,
        shape=weight.shape,
        code=bnb.get_4bit_type(quant_type, device=str(weight.device)),
        blocksize=QUANTIZATION_BLOCK,
        quant_type=quant_type,
        dtype=dtype,
    )
    if quantization["bnb_4bit_use_double_quant"]:
        state.nested, state.offset = True, scales.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(scales - state.offset, blocksize=SCALES_BLOCK)
    return codes, state


def _quantise(blocks: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = bnb.quantize_4bit(blocks, blocksize=QUANTIZATION_BLOCK, quant_type=quant_type)
    return codes.view(-1), state.absmax


def _quantise_on_cpu(blocks: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same codes, computed many times faster.

    bitsandbytes looks every value up among the midpoints of the levels by binary search, one after the other; counting
    the midpoints below it takes more operations, but numpy does 16 and more of them at once (torch does not).
    """
    levels, order = bnb.get_4bit_type(quant_type, device="cpu").sort()
    values = blocks.float()
    scales = values.abs().amax(dim=-1)
    scaled = (values * (1.0 / scales.clamp(min=1e-38)).view(-1, 1)).view(-1).numpy()
    codes = np.zeros(scaled.shape, dtype=np.uint8)
    above = np.empty(scaled.shape, dtype=np.bool_)
    for midpoint in ((levels[:-1] + levels[1:]) / 2).numpy():
        np.greater(scaled, midpoint, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    if quant_type != "nf4":  # whose levels are in order
        codes = order.numpy().astype(np.uint8)[codes]
    return torch.from_numpy(codes[::2] << 4 | codes[1::2]), scales


def dequantise_4bit(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """The weight `(out, in)` behind the result of `quantise_4bit`, in the state's dtype."""
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    result = torch.empty((scales.numel(), QUANTIZATION_BLOCK), dtype=state.dtype, device=codes.device)
    rows = zip(codes.split(_PART * QUANTIZATION_BLOCK // 2), scales.split(_PART), result.split(_PART), strict=True)
    for own_codes, own_scales, own_rows in rows:
        part = bnb.QuantState(
            absmax=own_scales,
            shape=own_rows.shape,
            code=state.code,
            blocksize=QUANTIZATION_BLOCK,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        own_rows.copy_(bnb.dequantize_4bit(own_codes.view(-1, 1), part))
    return result.view(-1)[: state.shape.numel()].view(state.shape)
