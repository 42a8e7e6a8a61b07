"""KL divergence and top-1 agreement between an exported model and the unmerged adapters. `check` calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tuna_peft.limits import FP32_ROWS

_16_BIT = (torch.bfloat16, torch.float16)

# Rows of logits converted to float64 at a time: at a vocabulary of 128k, 64 rows are 65 MB.
_ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) over the next-token distributions after every token of some prompts.

    Attributes:
        kl_mean: Mean over tokens, in nats.
        kl_max: Maximum over tokens, in nats.
        top1_agreement: Share of tokens after which both models predict the same next token.
        logit_max: The largest absolute difference between two logits.
        tokens: Number of tokens.
        noise: `kl_mean` of the reference computing in the 16-bit dtype of its training, from itself in fp32. A smaller
            difference is lost there. None after training in fp32, or if it was not measured.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float
    logit_max: float
    tokens: int
    noise: float | None = None

    def __str__(self) -> str:
        below = f" (less than the rounding noise of training's dtype, {self.noise:.2e})" if self.is_noise else ""
        return (
            f"mean {self.kl_mean:.2e}{below}, largest {self.kl_max:.2e} nats; "
            f"same next token in {self.top1_agreement:.1%} of {self.tokens:,} tokens"
        )

    @property
    def is_noise(self) -> bool:
        """Whether rounding in the dtype of training makes a larger difference."""
        return self.noise is not None and self.kl_mean < self.noise


def divergence(
    reference_logits: Iterable[torch.Tensor], other_model: torch.nn.Module, token_batches: Iterable[torch.Tensor]
) -> Divergence:
    """Compares a loaded model with the logits of another one, batch by batch.

    Args:
        reference_logits: Logits `(batch, seq, vocabulary)` of the model to compare with, one tensor per batch.
        other_model: The causal LM to measure, with the same vocabulary.
        token_batches: Token ids `(batch, seq)` without padding, for example one prompt per batch.

    Raises:
        ValueError: No tokens.
    """
    kls, agreements, logit_max = [], [], 0.0
    for expected, found in zip(reference_logits, iter_logits(other_model, token_batches), strict=True):
        for p, q in zip(expected.flatten(0, 1).split(_ROWS), found.flatten(0, 1).split(_ROWS), strict=True):
            # In float64, because rounding of log-probabilities in fp32 would hide a KL of 1e-10.
            logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
            kls.append((logp.exp() * (logp - logq)).sum(-1))
            agreements.append(p.argmax(-1) == q.argmax(-1))
            logit_max = max(logit_max, (p.double() - q.double()).abs().max().item())
    if not kls:
        raise ValueError("no tokens to compare on")
    kl, agreement = torch.cat(kls), torch.cat(agreements)
    return Divergence(kl.mean().item(), kl.max().item(), agreement.double().mean().item(), logit_max, kl.numel())


@torch.no_grad()
def iter_logits(model: torch.nn.Module, token_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The model's logits `(batch, seq, vocabulary)`, on the CPU, one batch after the other."""
    # Offloaded weights are meta tensors; their hooks accept tokens on any device.
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    for tokens in token_batches:
        yield model(input_ids=tokens.to(device)).logits.cpu()


@contextlib.contextmanager
def fp32_computation(model: torch.nn.Module) -> Iterator[None]:
    """Lets a model of 16-bit or 4-bit weights compute in fp32, with its weights as they are.

    Rounding of 16-bit activations would hide what an export rounds. Weights are converted when they are used, one at a
    time, so the model needs no more memory than before.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    dtypes = [layer.compute_dtype for layer in layers]
    for layer in layers:
        layer.compute_dtype = torch.float32
    try:
        with _InFp32():
            yield
    finally:
        for layer, dtype in zip(layers, dtypes, strict=True):
            layer.compute_dtype = dtype


class _InFp32(TorchFunctionMode):
    """Embeddings return fp32, and functions that want one dtype get fp32 where it meets 16 bits."""

    _CONVERTED = (
        functional.linear,
        functional.layer_norm,
        functional.rms_norm,
        functional.scaled_dot_product_attention,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            return func(*args, **kwargs).float()
        if func is functional.linear and len(args[1]) > FP32_ROWS and args[1].dtype in _16_BIT:
            return _large_linear(*args, **kwargs)
        if func in self._CONVERTED:
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _large_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product with a 16-bit head, of which `FP32_ROWS` rows at a time are converted."""
    output = input.new_empty(*input.shape[:-1], len(weight), dtype=torch.float32)
    for start in range(0, len(weight), FP32_ROWS):
        rows = slice(start, start + FP32_ROWS)
        output[..., rows] = functional.linear(input.float(), weight[rows].float())
    return output if bias is None else output.add_(bias)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _16_BIT else value
