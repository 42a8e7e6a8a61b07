"""Gradients of a whole ranking step in 16 bits beside those of the same weights in fp32."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from benchmarks.arms import ARMS, to_device
from benchmarks.gpu.steps import Arms, Setting
from benchmarks.shapes import build, config_of, set_checkpointing

SCALE = 1024.0  # of the loss, so that gradients in fp16 do not become zero


def arms(setting: Setting) -> Arms:
    """bf16 and fp16; packed sequences with attention by segment."""

    @cache
    def exact() -> torch.Tensor:
        return gradient(setting, torch.float32)

    return {
        str(dtype).removeprefix("torch."): lambda dtype=dtype: _compared(gradient(setting, dtype), exact())  # type: ignore[misc]
        for dtype in (torch.bfloat16, torch.float16)
    }


def gradient(setting: Setting, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of all trained weights as one vector, of two groups of long-varied."""
    model = build(setting.shape, setting.device, dtype=torch.float32)
    base = model.get_base_model()
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.dtype = module.compute_dtype = dtype
    for parameter in base.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():  # embedding, norms and head
            parameter.data = parameter.data.to(dtype)
    set_checkpointing(model, False)
    groups = setting.workload.groups(2, config_of(setting.shape).vocab_size)
    half = dtype != torch.float32
    with torch.autocast(setting.device, dtype) if half else nullcontext():
        loss = ARMS["ours"].loss(model, setting.device)(to_device(ARMS["ours"].batch(groups), setting.device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss.float() * SCALE, trained)
    return torch.cat([one.flatten().float() for one in found]) / SCALE


def _compared(found: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(found, exact, dim=0)),
        "relative_error": float((found - exact).norm() / exact.norm()),
        "norm": float(exact.norm()),
    }
