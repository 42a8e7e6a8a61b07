"""Matrix products of 16-bit tensors with fp32 results: for the logits and for the gradients of adapters."""

from __future__ import annotations

import torch

# PyTorch 2.8 or later, CUDA only.
_MM_INTO_FP32 = torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` of two matrices of one dtype, in fp32; on a GPU without rounding to 16 bits first."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16) and _MM_INTO_FP32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
