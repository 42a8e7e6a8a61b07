"""LoRA layers that compute all adapters of a stack at once.

PEFT computes adapters one by one, each with casts, a scaled copy of its output and a sum, all as large as the layer's
output: memory traffic that costs more than the low-rank products themselves. Here the factors of all active adapters
are concatenated, so a stack takes two low-rank products, added in place to the output of the base layer:

    y = W x + [s_1 B_1 | .. | s_k B_k] [A_1; ..; A_k] x

in the compute dtype (autocast's, else that of x), with a custom backward pass. The concatenated factors are kept until
a weight changes, so the passes of a step share them, checkpointing's recomputation and the backward pass too.
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
from torch.optim.optimizer import register_optimizer_step_post_hook

from tuna_peft.models.base.dequantise import dequantised_weight
from tuna_peft.models.forward.products import matmul_fp32

_steps_of_optimizers = 0


def _count_step(*_: Any) -> None:
    global _steps_of_optimizers
    _steps_of_optimizers += 1


# bitsandbytes writes new weights without raising their `_version`, so the steps of all optimizers are counted as well.
register_optimizer_step_post_hook(_count_step)


class _StackedLora(torch.autograd.Function):
    """The equation above. `trained` alternates A and B of each trainable adapter; `scales` are their factors s."""

    @staticmethod
    def forward(ctx, x, base_layer, down_RI, up_OR, scales, *trained):
        y = base_layer(x)
        x_TI = x.reshape(-1, x.shape[-1])
        z_TR = x_TI @ down_RI.T
        y.view(-1, y.shape[-1]).addmm_(z_TR, up_OR.T)  # in place: no second tensor of the output's size
        # Not among the saved tensors: all passes share the factors, so they are no activations of this one.
        ctx.factors = down_RI, up_OR
        ctx.base_layer, ctx.scales = base_layer, scales
        ctx.ranks = [len(down) for down in trained[::2]]
        ctx.save_for_backward(x_TI, z_TR)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_TI, z_TR = ctx.saved_tensors
        down_RI, up_OR = ctx.factors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_z_TR = grad_TO @ up_OR
        grad_x = None
        if ctx.needs_input_grad[0]:
            # A 4-bit weight is dequantized again instead of being saved from the forward pass: 16 bits against 4.
            grad_x = grad_TO @ dequantised_weight(ctx.base_layer).to(grad.dtype)
            grad_x = grad_x.addmm_(grad_z_TR, down_RI).view(*grad.shape[:-1], -1)
        gradients: list[torch.Tensor] = []
        start = len(down_RI) - sum(ctx.ranks)  # frozen adapters come first
        for rank, scale in zip(ctx.ranks, ctx.scales, strict=True):
            ranks = slice(start, start := start + rank)
            gradients.append(matmul_fp32(grad_z_TR[:, ranks].T, x_TI))
            gradients.append(matmul_fp32(grad_TO.T, z_TR[:, ranks]).mul_(scale))
        return grad_x, None, None, None, None, *gradients


class _Stacked(lora.LoraLayer):
    """Mixin for PEFT's LoRA layers: plain LoRA is computed as above, everything else by PEFT's own `forward`.

    Attributes:
        fused: False uses PEFT's `forward` always; a class attribute, for benchmarks.
    """

    fused = True
    _factors: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        other = args or kwargs or self.disable_adapters or self.merged
        if other or not self.fused or not all(map(self._is_plain, names)):
            return super().forward(x, *args, **kwargs)
        # The cast that autocast would make, here so that the backward pass, which runs without it, has the same dtype.
        device_type = x.device.type
        x = x.to(torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype)
        trained = [name for name in names if self.lora_A[name].weight.requires_grad]
        # Nothing changes weights between the passes of a training step; elsewhere a user may, and leave no trace.
        keep = not trained or (self.training and torch.is_grad_enabled())
        joined = self._joined([name for name in names if name not in trained] + trained, x, keep)
        weights = [part[name].weight for name in trained for part in (self.lora_A, self.lora_B)]
        return _StackedLora.apply(x, self.base_layer, *joined, [self.scaling[name] for name in trained], *weights)

    def _is_plain(self, name: str) -> bool:
        """Whether the adapter computes scaling * B A x now: no variant such as DoRA, no bias, no active dropout."""
        dropout = self.lora_dropout[name]
        return (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and (isinstance(dropout, torch.nn.Identity) or not dropout.training)
        )

    def _joined(self, names: list[str], x: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """`(R, I)` all A and `(O, R)` all s B, concatenated along the ranks in the dtype of x.

        With `keep` they are cached until a weight changes or is replaced.
        """
        factors = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in names]
        if torch.compiler.is_compiling():  # a compiled layer joins them in two kernels, and cannot read versions
            return _join(factors, x, self.in_features, self.out_features)
        # `_version` counts in-place changes of a tensor, such as loading other weights into it.
        weights = ((a.data_ptr(), a._version, b.data_ptr(), b._version, scale) for a, b, scale in factors)
        state = (x.dtype, x.device, _steps_of_optimizers, *weights)
        if keep and self._factors is not None and self._factors[0] == state:
            return self._factors[1:]
        joined = _join(factors, x, self.in_features, self.out_features)
        self._factors = (state, *joined) if keep else None
        return joined


@torch.no_grad()
def _join(
    factors: list[tuple[torch.Tensor, torch.Tensor, float]], x: torch.Tensor, inputs: int, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `_Stacked._joined`; `factors` are A, B and s of each adapter."""
    down_RI = torch.cat([x.new_empty(0, inputs), *(a.to(x.dtype) for a, _, _ in factors)])
    up_OR = torch.cat([x.new_empty(outputs, 0), *((b * scale).to(x.dtype) for _, b, scale in factors)], dim=1)
    return down_RI, up_OR


class StackedLinear(_Stacked, lora.Linear):
    """LoRA on `torch.nn.Linear`."""


class StackedLinear4bit(_Stacked, PeftLinear4bit):
    """LoRA on bitsandbytes' `Linear4bit`."""


def adds_plain_lora(layer: torch.nn.Module) -> bool:
    """Whether `layer` is a LoRA layer that now computes `W x + sum of s B A x`, or W x where adapters are disabled."""
    return (
        isinstance(layer, _Stacked)
        and not layer.merged
        and all(layer._is_plain(name) for name in layer.active_adapters if name in layer.lora_A)
    )


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
