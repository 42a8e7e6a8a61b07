"""LoRA layers that compute all adapters of a stack at once.

PEFT computes adapters one by one, each with casts, a scaled copy of its output and a sum, all as large as the layer's
output: memory traffic that costs more than the low-rank products themselves. Here the factors of all active adapters
are concatenated, so a stack takes two low-rank products, added in place to the output of the base layer:

    y = W x + [s_1 B_1 | .. | s_k B_k] [A_1; ..; A_k] x

in the compute dtype (autocast's, else that of x), with a custom backward pass. Frozen adapters are concatenated once.
`tuna_peft.models.stack.adapters.push_adapter` registers the layers with PEFT.

Shape suffixes: T tokens, I and O sizes of the layer's input and output, R sum of the adapters' ranks.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import peft.tuners.lora as lora
import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch.autograd.function import once_differentiable

from tuna_peft.models.base.dequantise import dequantised_weight


class _StackedLora(torch.autograd.Function):
    """The equation above. `trained` alternates A and B of each trainable adapter; `scales` are their factors s."""

    @staticmethod
    def forward(ctx, x, base_layer, frozen_RI, frozen_OR, scales, *trained):
        down_RI, up_OR = _joined(frozen_RI, frozen_OR, scales, trained)
        y = base_layer(x)
        x_TI = x.reshape(-1, x.shape[-1])
        z_TR = x_TI @ down_RI.T
        y.view(-1, y.shape[-1]).addmm_(z_TR, up_OR.T)  # in place: no second tensor of the output's size
        ctx.base_layer, ctx.scales = base_layer, scales
        ctx.save_for_backward(x_TI, z_TR, frozen_RI, frozen_OR, *trained)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_TI, z_TR, frozen_RI, frozen_OR, *trained = ctx.saved_tensors
        down_RI, up_OR = _joined(frozen_RI, frozen_OR, ctx.scales, trained)
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_z_TR = grad_TO @ up_OR
        grad_x = None
        if ctx.needs_input_grad[0]:
            # A 4-bit weight is dequantized again instead of being saved from the forward pass: 16 bits against 4.
            grad_x = grad_TO @ dequantised_weight(ctx.base_layer).to(grad.dtype)
            grad_x = grad_x.addmm_(grad_z_TR, down_RI).view(*grad.shape[:-1], -1)
        gradients: list[torch.Tensor] = []
        start = len(down_RI) - sum(len(down) for down in trained[::2])  # frozen adapters come first
        for down, up, scale in zip(trained[::2], trained[1::2], ctx.scales, strict=True):
            ranks = slice(start, start := start + len(down))
            gradients.append((grad_z_TR[:, ranks].T @ x_TI).to(down.dtype))
            gradients.append((grad_TO.T @ z_TR[:, ranks]).to(up.dtype) * scale)
        return grad_x, None, None, None, None, *gradients


def _joined(frozen_RI, frozen_OR, scales, trained) -> tuple[torch.Tensor, torch.Tensor]:
    """`(R, I)` all A and `(O, R)` all s B, concatenated along the ranks, in the dtype of the frozen ones."""
    dtype = frozen_RI.dtype
    ups = [(up * scale).to(dtype) for up, scale in zip(trained[1::2], scales, strict=True)]
    return torch.cat([frozen_RI, *(down.to(dtype) for down in trained[::2])]), torch.cat([frozen_OR, *ups], dim=1)


class _Stacked(lora.LoraLayer):
    """Mixin for PEFT's LoRA layers: plain LoRA is computed as above, everything else by PEFT's own `forward`.

    Attributes:
        fused: False uses PEFT's `forward` always; a class attribute, for benchmarks.
    """

    fused = True
    _frozen: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        other = args or kwargs or self.disable_adapters or self.merged
        if other or not self.fused or not all(map(self._is_plain, names)):
            return super().forward(x, *args, **kwargs)
        # The cast that autocast would make, here so that the backward pass, which runs without it, has the same dtype.
        device_type = x.device.type
        x = x.to(torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype)
        trained = [name for name in names if self.lora_A[name].weight.requires_grad]
        frozen = self._joined_frozen([name for name in names if name not in trained], x)
        factors = [part[name].weight for name in trained for part in (self.lora_A, self.lora_B)]
        return _StackedLora.apply(x, self.base_layer, *frozen, [self.scaling[name] for name in trained], *factors)

    def _is_plain(self, name: str) -> bool:
        """Whether the adapter computes scaling * B A x now: no variant such as DoRA, no bias, no active dropout."""
        dropout = self.lora_dropout[name]
        return (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and (isinstance(dropout, torch.nn.Identity) or not dropout.training)
        )

    def _joined_frozen(self, names: list[str], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen adapters, concatenated in the dtype of x; cached until one of them changes or is replaced."""
        factors = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in names]
        # `_version` counts in-place changes of a tensor, such as loading other weights into it.
        state = (x.dtype, x.device, *((a.data_ptr(), a._version, b.data_ptr(), b._version, s) for a, b, s in factors))
        if self._frozen is None or self._frozen[0] != state:
            with torch.no_grad():
                empty = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)
                trained = [factor for down, up, _ in factors for factor in (down, up)]
                self._frozen = state, *_joined(*empty, [scale for *_, scale in factors], trained)
        return self._frozen[1:]


class StackedLinear(_Stacked, lora.Linear):
    """LoRA on `torch.nn.Linear`."""


class StackedLinear4bit(_Stacked, PeftLinear4bit):
    """LoRA on bitsandbytes' `Linear4bit`."""


def register(config: lora.LoraConfig) -> None:
    """Makes PEFT create these layers for an adapter, through its hook for custom LoRA layers; int8 keeps PEFT's own.

    The hook, `LoraConfig._register_custom_module`, is documented by PEFT as experimental (as of 0.21).
    """
    config._register_custom_module(
        {
            bitsandbytes.nn.Linear4bit: StackedLinear4bit,
            bitsandbytes.nn.Linear8bitLt: lora.Linear8bitLt,
            torch.nn.Linear: StackedLinear,
        }
    )
