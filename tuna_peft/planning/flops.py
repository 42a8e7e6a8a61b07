"""Operations of a run and the hours that they take.

Matrix products only, a multiplication and an addition each, as `benchmarks/flops.py` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.planning.gpus import Gpu
from tuna_peft.planning.memory import Adapter, Precision
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import Workload


@dataclass(frozen=True)
class Utilisation:
    """The share of a card's arithmetic that training reaches, and who measured it."""

    share: float
    source: str


# None of this package's own: it has not been timed on a GPU yet.
TRAINING = Utilisation(
    0.30,
    "not measured with this package: 30 % of a card's 16-bit peak is what 2,415 tokens/s of Llama-2-7B QLoRA with the "
    "Hugging Face libraries on an A100 comes to, as unsloth's benchmark has it",
)


def ranking_flops(
    shape: ModelShape, workload: Workload, own: Adapter, below: Sequence[Adapter] = (), unchecked: int = 0
) -> float:
    """FLOPs of a packed row's training step.

    Args:
        unchecked: Layers that are not computed twice.
    """
    again = 1 - unchecked / shape.layers
    return (
        _step(shape, workload.tokens, workload.attended, own, below, again) + 4 * shape.head * workload.response_tokens
    )


def sft_flops(
    shape: ModelShape, workload: Workload, own: Adapter, below: Sequence[Adapter] = (), unchecked: int = 0
) -> float:
    """FLOPs of a supervised row's training step; TRL makes its logits again in the backward pass."""
    again = 1 - unchecked / shape.layers
    tokens = workload.tokens
    return _step(shape, tokens, tokens**2, own, below, again) + 6 * shape.head * workload.response_tokens


def forward_flops(shape: ModelShape, tokens: float, targets: float) -> float:
    """FLOPs of a pass without gradients."""
    return 2 * shape.body * tokens + 2 * shape.head * targets


def _step(
    shape: ModelShape, tokens: float, attended: float, own: Adapter, below: Sequence[Adapter], again: float
) -> float:
    frozen = shape.body + sum(adapter.parameters for adapter in below)  # forward, gradient of the activations
    return (
        (4 + 2 * again) * frozen * tokens
        + (6 + 2 * again) * own.parameters * tokens
        + (12 + 4 * again) * shape.query_size * shape.layers * attended
    )


def hours(flops: float, gpu: Gpu) -> float:
    """Time on a card at the utilisation of `TRAINING`."""
    return flops / (gpu.tflops * 1e12 * TRAINING.share) / 3600


def decode_hours(shape: ModelShape, precision: Precision, steps: float, seen: float, gpu: Gpu) -> float:
    """Time of `steps` generated positions of a batch, bound by what is read: weights, keys and values.

    Of a 4-bit base every step unpacks all matrices: it writes and reads them in 16 bits.

    Args:
        seen: Mean tokens whose keys and values a step reads, over the whole batch.
    """
    unpacked = 2.0 * precision.compute * shape.body if precision.method in ("nf4", "fp4") else 0.0
    weights = shape.body * precision.body + precision.compute * shape.head + unpacked
    keys = 2.0 * precision.compute * shape.kv_size * shape.layers * seen
    return steps * (weights + keys) / (gpu.gb_per_second * 1e9) / 3600
