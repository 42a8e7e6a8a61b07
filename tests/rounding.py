"""How far two computations of the same numbers may be apart when they differ only in the order of their operations.

The result of an operation is rounded: it is off by up to eps / 2 of its size, eps being that of the dtype. Errors of
n operations in sequence add up like a random walk (Higham and Mary 2019, https://doi.org/10.1137/18M1226312), for
the terms of a sum in any order, so that a bound does not depend on a processor's vectors or threads:

    bound = FACTOR * eps(dtype) * sqrt(operations) * scale

`FACTOR` is for what this leaves out: two computations differ instead of one being wrong, the largest of thousands of
errors counts and not a typical one, and a norm or a softmax can enlarge an error that comes in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tuna_peft.models.stack.files import AdapterStack

FACTOR = 8


def rounding(operations: float, scale: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The bound.

    Args:
        operations: Additions and multiplications in sequence on the way to one result: n for a sum of n products.
        scale: Size of the results; of a tensor, its largest absolute value.
        dtype: What the operations round to.
    """
    size = scale.abs().max().item() if isinstance(scale, torch.Tensor) else abs(scale)
    return FACTOR * torch.finfo(dtype).eps * math.sqrt(operations) * size


def operations_of(model: torch.nn.Module) -> int:
    """The operations in sequence from a token to its logits: the inputs of all linear layers.

    Layers beside each other (q, k, v; gate, up) need not be added; they stand for the attention and the norms.
    """
    return sum(getattr(module, "in_features", 0) for module in model.modules())


def gradient_operations(model: torch.nn.Module) -> int:
    """The operations in sequence on the way to a gradient: forward, back again, and the product of both."""
    return 3 * operations_of(model)


@torch.no_grad()
def logits_bound(model: torch.nn.Module) -> float:
    """How far the logits of a model in fp32 may be apart, by their size after some tokens."""
    device = next(model.parameters()).device
    return rounding(operations_of(model), model(input_ids=torch.arange(3, 60, device=device)[None]).logits)


def logps_bound(model: torch.nn.Module, tokens: int = 1) -> float:
    """The same for a sum of `tokens` log-probabilities: each has the errors of a logit and of the sum over all."""
    return tokens * 2 * logits_bound(model)


def kl_bound(model: torch.nn.Module) -> float:
    """The largest KL divergence, after any token, of two models with such logits.

    With q proportional to p * exp(d), KL(p || q) is log E exp(d - E d) under p: at most (range of d)^2 / 8, by
    Hoeffding's lemma. The difference d of two logits is within plus and minus their bound.
    """
    return (2 * logits_bound(model)) ** 2 / 8


def stack_kl_bound(stack: Path, **options: Any) -> float:
    """`kl_bound` of the stack in a folder."""
    return kl_bound(AdapterStack.from_pretrained(stack, device="cpu", **options).model)


def assert_rounded(
    found: torch.Tensor,
    expected: torch.Tensor,
    operations: float,
    *,
    scale: float | torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> None:
    """Both tensors are equal up to `rounding`; by default of fp32, relative to the largest of `expected`."""
    bound = rounding(operations, expected if scale is None else scale, dtype)
    torch.testing.assert_close(found.double(), expected.double(), atol=bound, rtol=0, msg=lambda m: f"{name}: {m}")


def rounded(expected: Any, operations: float, scale: float) -> Any:
    """Python numbers, or lists or dicts of them, that were computed in fp32, for comparison with `==`."""
    return pytest.approx(expected, rel=0, abs=rounding(operations, scale))
