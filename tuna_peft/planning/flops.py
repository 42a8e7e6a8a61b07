"""FLOPs of a run and the hours that they take.

Only matrix products are counted, two FLOPs for each multiplication with its addition, as in `benchmarks/flops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.planning.gpus import Gpu
from tuna_peft.planning.memory import Adapter, Precision, dense_bytes, packs
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import Workload


@dataclass(frozen=True)
class Utilization:
    """The share of a GPU's peak FLOP/s that training reaches, and who measured it."""

    share: float
    source: str


# This package has not been timed on a GPU yet.
TRAINING = Utilization(
    0.30,
    "not measured with this package: 30 % of a GPU's 16-bit peak corresponds to 2,415 tokens/s of Llama-2-7B QLoRA "
    "with the Hugging Face libraries on an A100, from unsloth's benchmark",
)


# Of a decoding step with a 4-bit base and two adapters: 69 to 84 operators a layer were counted, on a CPU. Ten
# microseconds for each, with the Python code around it, is an assumption.
LAUNCHES_A_LAYER, SECONDS_A_LAUNCH = 75, 10e-6

ON_CPU = Utilization(
    0.6,
    "on this CPU: products of large matrices were timed for a second; 60 % of their rate is assumed, where a ranking "
    "step reached 71 % on two cores",
)


def ranking_flops(
    shape: ModelShape, workload: Workload, own: Adapter, below: Sequence[Adapter] = (), kept_layers: int = 0
) -> float:
    """FLOPs of a training step for one packed sequence.

    Args:
        own: The adapter that is trained.
        below: The frozen adapters that it is trained on top of.
        kept_layers: Layers without gradient checkpointing.
    """
    recomputed = 1 - kept_layers / shape.layers
    return (
        _step(shape, workload.tokens, workload.attended, own, below, recomputed)
        # The head is frozen: forward pass and gradient of its input, two FLOPs a parameter each.
        + 4 * shape.head * workload.response_tokens
    )


def sft_flops(
    shape: ModelShape, workload: Workload, own: Adapter, below: Sequence[Adapter] = (), kept_layers: int = 0
) -> float:
    """FLOPs of a training step for one response in supervised fine-tuning; arguments as for `ranking_flops`."""
    recomputed = 1 - kept_layers / shape.layers
    tokens = workload.tokens
    # The head: 2 + 2 as for ranking, and 2 because TRL recomputes the logits in the backward pass.
    return _step(shape, tokens, tokens**2, own, below, recomputed) + 6 * shape.head * workload.response_tokens


def forward_flops(shape: ModelShape, tokens: float, targets: float) -> float:
    """FLOPs of a forward pass without gradients, with logits for `targets` of its tokens."""
    return 2 * shape.body * tokens + 2 * shape.head * targets


def _step(
    shape: ModelShape, tokens: float, attended: float, own: Adapter, below: Sequence[Adapter], recomputed: float
) -> float:
    """FLOPs inside the layers, of which the share `recomputed` runs its forward pass twice."""
    frozen = shape.body + sum(adapter.parameters for adapter in below)
    # Two FLOPs a parameter for the forward pass and two for the gradient of the input; a trained parameter needs two
    # more for its own gradient. Attention has two products (scores, weighted sum): 4 in the forward pass and twice
    # that in the backward pass.
    return (
        (4 + 2 * recomputed) * frozen * tokens
        + (6 + 2 * recomputed) * own.parameters * tokens
        + (12 + 4 * recomputed) * shape.query_size * shape.layers * attended
    )


def hours(flops: float, gpu: Gpu) -> float:
    """Hours on a GPU at the utilization of `TRAINING`, or on a CPU whose rate was measured at that of `ON_CPU`."""
    share = (ON_CPU if gpu.measured else TRAINING).share
    return flops / (gpu.tflops * 1e12 * share) / 3600


def decode_hours(
    shape: ModelShape, precision: Precision, steps: float, rows: int, cached: float, gpu: Gpu, *, dense: bool = False
) -> float:
    """Hours of `steps` decoding steps.

    A step reads all weights, keys and values, and a 4-bit base is dequantized, which writes and reads its matrices in
    16 bits, unless the GPU has a kernel that needs no dequantization for so few rows. Meanwhile the CPU launches the
    step's kernels, so the slower of the two counts.

    Args:
        rows: Sequences that are generated together.
        cached: Mean tokens in the key-value cache during a step, summed over the batch.
        dense: Whether a dense copy of the layers is read instead.
    """
    dequantizes = precision.method in ("nf4", "fp4") and rows > gpu.fused_rows
    dequantized = 2.0 * precision.compute * shape.body if dequantizes else 0.0
    weights = shape.body * precision.body + dequantized + precision.compute * shape.head
    if dense:
        copy = dense_bytes(shape, precision)
        weights = copy if packs(shape, precision) else copy + precision.compute * shape.head
    keys = 2.0 * precision.compute * shape.kv_size * shape.layers * cached
    launching = 0.0 if gpu.measured else LAUNCHES_A_LAYER * shape.layers * SECONDS_A_LAUNCH
    return steps * max((weights + keys) / (gpu.gb_per_second * 1e9), launching) / 3600
