"""Log-probabilities of given tokens from hidden states, without the logits of all tokens in memory at once.

`tuna_peft.models.forward.scoring` calls it after each forward pass.

Shape suffixes: R predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tuna_peft.errors import UserError
from tuna_peft.limits import CHUNK_ROWS
from tuna_peft.models.forward.products import matmul_fp32


@dataclass(frozen=True)
class Head:
    """An output layer: `z = factor * (hidden @ weight.T + bias)`; the logits are z, or `cap * tanh(z / cap)`.

    Attributes:
        weight_VD: `(vocabulary, hidden)`.
        bias_V: `(vocabulary,)`, or None.
        factor: Granite's `1 / logits_scaling`, Cohere's `logit_scale`; 1 for most models.
        cap: Gemma 2's `final_logit_softcapping`; None for most models.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    factor: float = 1.0
    cap: float | None = None


class _TokenLogps(torch.autograd.Function):
    """log p(target) of each row; the forward pass also computes d log p / d hidden from the same logits.

    A row's log-probability is a scalar, so the gradient with respect to its hidden state is a vector (the slope) that
    the backward pass only multiplies by the incoming gradient: no second product with the head, and no more memory
    than the hidden states. For a head that trains itself (no adapters), the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, targets_R, factor, cap):
        head = Head(weight_VD, bias_V, factor, cap)
        of_hidden, *of_head = ctx.needs_input_grad[:3]
        logps, slopes = zip(
            *(_chunk(rows, targets, head, of_hidden) for rows, targets in _chunks(hidden_RD, targets_R)), strict=True
        )
        ctx.factor, ctx.cap = factor, cap
        ctx.save_for_backward(
            torch.cat(slopes) if of_hidden else None,
            *((hidden_RD, weight_VD, bias_V, targets_R) if any(of_head) else ()),
        )
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_R):
        slope_RD, *rest = ctx.saved_tensors
        grad_hidden = None if slope_RD is None else (slope_RD * grad_R[:, None]).to(slope_RD.dtype)
        grad_weight = grad_bias = None
        if rest:
            hidden_RD, weight_VD, bias_V, targets_R = rest
            head = Head(weight_VD, bias_V, ctx.factor, ctx.cap)
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
            for rows_RD, targets, grads in _chunks(hidden_RD, targets_R, grad_R):
                slope_RV = _logps_and_slopes(rows_RD, targets, head)[1] * grads[:, None]
                grad_weight += slope_RV.to(rows_RD.dtype).T @ rows_RD
                if grad_bias is not None:
                    grad_bias += slope_RV.sum(0)
            grad_weight = grad_weight.to(weight_VD.dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(*columns: torch.Tensor) -> Iterator[Any]:
    return zip(*(column.split(CHUNK_ROWS) for column in columns), strict=True)


def _chunk(hidden_RD, targets_R, head: Head, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and slopes by hidden state; a separate function, so that its return frees the logits."""
    logps, slope_RV = _logps_and_slopes(hidden_RD, targets_R, head, with_slope)
    return logps, None if slope_RV is None else slope_RV.to(head.weight_VD.dtype) @ head.weight_VD


def _logps_and_slopes(hidden_RD, targets_R, head: Head, with_slope=True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(R,)` log p(target); `(R, V)` its derivative by `hidden @ weight.T + bias`, in fp32 as 1 - p(t) may be tiny."""
    logits = _logits(hidden_RD, head.weight_VD, head.bias_V)
    if head.factor != 1:
        logits.mul_(head.factor)
    bend = None  # of the soft cap
    if head.cap is not None:
        logits.div_(head.cap).tanh_()
        bend = logits.square().neg_().add_(1) if with_slope else None
        logits.mul_(head.cap)
    chosen = logits.gather(-1, targets_R[:, None])
    # Softmax and its normalizer in place: library functions would each allocate a copy of the chunk.
    highest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(highest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    logps = (chosen - highest - total.log()).squeeze(-1)
    if not with_slope:
        return logps, None
    slope = exponentials.div_(-total)  # d log p(t) / d logits = onehot(t) - softmax
    slope.scatter_add_(-1, targets_R[:, None], torch.ones_like(chosen))
    if bend is not None:
        slope.mul_(bend)
    return logps, slope.mul_(head.factor) if head.factor != 1 else slope


def _logits(hidden_RD, weight_VD, bias_V) -> torch.Tensor:
    """`hidden @ weight.T + bias` in fp32, on a GPU not rounded to 16 bits first: bf16 has steps of 1/8 from 16 on, as
    wide as a margin."""
    logits = matmul_fp32(hidden_RD, weight_VD.T)
    return logits if bias_V is None else logits.add_(bias_V)


def token_logps(hidden_RD: torch.Tensor, head: Head, targets_R: torch.Tensor) -> torch.Tensor:
    """log p(target | context) for R tokens.

    Args:
        hidden_RD: `(R, hidden)` final hidden states (after the last norm) at the positions that predict.
        head: The output layer, see `output_head`.
        targets_R: `(R,)` token ids.

    Returns:
        `(R,)` in fp32, nats, differentiable in `hidden_RD` and in the head's weight and bias.
    """
    if not len(targets_R):
        return hidden_RD.sum(-1).float()
    hidden_RD = hidden_RD.to(head.weight_VD.dtype)
    return _TokenLogps.apply(hidden_RD, head.weight_VD, head.bias_V, targets_R, head.factor, head.cap)


def output_head(model: torch.nn.Module) -> Head:
    """The model's output layer, with the factor and the soft cap that its configuration gives to the logits.

    `verify_packing` compares it with the model's own logits, so a model that changes them in another way is rejected.

    Raises:
        UserError: The head is quantized, has an adapter, or is no linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"the output layer is a {type(head).__name__}, not a plain linear layer",
            fix="Leave `lm_head` out of target_modules and of the quantization.",
        )
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0
    if scaling := getattr(config, "logits_scaling", None):
        # The same name in the configuration of HyperCLOVA X multiplies.
        factor *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    return Head(head.weight, head.bias, factor, getattr(config, "final_logit_softcapping", None) or None)
