"""Log-probabilities of given tokens from hidden states, without the logits of all tokens in memory at once.

`tuna_peft.models.forward.scoring` calls it after each forward pass.

Shape suffixes: R predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

from tuna_peft.errors import UserError
from tuna_peft.limits import CHUNK_ROWS

# 16-bit matrix product with an fp32 result: PyTorch 2.8 or later, CUDA only.
_MM_INTO_FP32 = torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


class _TokenLogps(torch.autograd.Function):
    """log p(target) of each row; the forward pass also computes d log p / d hidden from the same logits.

    A row's log-probability is a scalar, so the gradient with respect to its hidden state is a vector (the slope) that
    the backward pass only multiplies by the incoming gradient: no second product with the head, and no more memory
    than the hidden states.
    """

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, targets_R):
        chunks = zip(hidden_RD.split(CHUNK_ROWS), targets_R.split(CHUNK_ROWS), strict=True)
        logps, slopes = zip(
            *(_chunk(rows, weight_VD, bias_V, targets, ctx.needs_input_grad[0]) for rows, targets in chunks),
            strict=True,
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_R):
        (slope_RD,) = ctx.saved_tensors
        return (slope_RD * grad_R[:, None]).to(slope_RD.dtype), None, None, None


def _chunk(hidden_RD, weight_VD, bias_V, targets_R, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and slopes of some rows; a separate function, so that its return frees the logits."""
    logits = _logits(hidden_RD, weight_VD, bias_V)
    chosen = logits.gather(-1, targets_R[:, None])
    # Softmax and its normalizer in place: library functions would each allocate a copy of the chunk.
    highest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(highest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    logps = (chosen - highest - total.log()).squeeze(-1)
    if not with_slope:
        return logps, None
    # d log p(t) / d logits = onehot(t) - softmax, in fp32 until the product with the head, as 1 - p(t) may be tiny.
    slope = exponentials.div_(-total)
    slope.scatter_add_(-1, targets_R[:, None], torch.ones_like(chosen))
    return logps, slope.to(weight_VD.dtype) @ weight_VD


def _logits(hidden_RD, weight_VD, bias_V) -> torch.Tensor:
    """Logits in fp32, on a GPU not rounded to 16 bits first: bf16 has steps of 1/8 from 16 on, as wide as a margin."""
    if hidden_RD.is_cuda and hidden_RD.dtype in (torch.float16, torch.bfloat16) and _MM_INTO_FP32:
        logits = torch.mm(hidden_RD, weight_VD.T, out_dtype=torch.float32)
        return logits if bias_V is None else logits.add_(bias_V)
    return torch.nn.functional.linear(hidden_RD, weight_VD, bias_V).float()


def token_logps(hidden_RD: torch.Tensor, head: torch.nn.Linear, targets_R: torch.Tensor) -> torch.Tensor:
    """log p(target | context) for R tokens.

    Args:
        hidden_RD: `(R, hidden)` final hidden states (after the last norm) at the positions that predict.
        head: The output layer.
        targets_R: `(R,)` token ids.

    Returns:
        `(R,)` in fp32, nats, differentiable in `hidden_RD`; the head gets no gradient.
    """
    if not len(targets_R):
        return hidden_RD.sum(-1).float()
    return _TokenLogps.apply(hidden_RD.to(head.weight.dtype), head.weight, head.bias, targets_R)


def require_plain_head(model: torch.nn.Module) -> torch.nn.Linear:
    """The model's output layer, if logits are just `hidden @ weight.T + bias`.

    Raises:
        UserError: Logits are soft-capped or scaled, or the head is quantized or has an adapter.
    """
    config = model.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1.0):
            raise UserError(
                f"the model changes its logits by {key}={getattr(config, key)}",
                fix="Such an output layer is not supported; use a model with plain logits.",
            )
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"the output layer is a {type(head).__name__}, not a plain linear layer",
            fix="Leave `lm_head` out of target_modules and of the quantisation.",
        )
    return head
