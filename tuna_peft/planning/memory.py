"""Bytes of a run, part by part.

Letters in comments: T tokens of a forward pass, D hidden size, I inner size of the MLP, Q and K sizes of all queries
and of all keys of a token, b bytes of the compute type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass

# Blocks of 64 weights with a scale each: one byte under double quantisation, with an fp32 scale for 256 scales.
_BLOCK, _SCALES_BLOCK = 64, 256
CHUNK_ROWS = 256  # of logits at a time, as `training/logps.py` takes them; a test compares the two

# Bytes that a trainable parameter's optimiser state takes, by the beginning of its name; AdamW otherwise.
_OPTIMIZERS = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "ademamix_8bit": 3, "lion_8bit": 1,
    "paged_lion_8bit": 1, "lion": 4, "sgd": 0, "adafactor": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """How numbers are stored.

    Attributes:
        method: `nf4`, `fp4`, `int8` or `none`.
        double_quant: Of the 4-bit scales.
        compute: Bytes of the type that is computed in: 2 on a GPU, 4 on a CPU.
        flash: Whether FlashAttention runs (Ampere on).
    """

    method: str
    double_quant: bool
    compute: int
    flash: bool = False

    @property
    def body(self) -> float:
        """Bytes of a parameter of the body."""
        if self.method == "none":
            return self.compute
        if self.method == "int8":
            return 1.0  # and a scale for each row: nothing beside it
        scales = 1 / _BLOCK + 4 / (_BLOCK * _SCALES_BLOCK) if self.double_quant else 4 / _BLOCK
        return 0.5 + scales


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by its size."""

    rank: int
    parameters: int
    modules: int  # linear layers of a decoder layer that it stands on
    dropout: float = 0.0


def weight_parts(shape: ModelShape, precision: Precision) -> dict[str, float]:
    """The frozen base."""
    stored = "16-bit" if precision.compute == 2 else "32-bit"
    method = stored if precision.method == "none" else precision.method
    return {
        f"base layers, {method}": shape.body * precision.body,
        f"embedding, head, norms, {stored}": float(shape.unquantised * precision.compute),
    }


def optimizer_bytes(name: str) -> float:
    """Bytes of optimiser state for a trainable parameter."""
    return _OPTIMIZERS.get(name, 8)


def trainer_parts(own: Adapter, below: Sequence[Adapter], optimizer: str, precision: Precision) -> dict[str, float]:
    """Adapters, gradients and optimiser: adapters are held in fp32."""
    parts = {"adapter and its gradient, 32-bit": 8.0 * own.parameters}
    parts[f"optimiser ({optimizer})"] = optimizer_bytes(optimizer) * own.parameters
    return parts | frozen_parts(below, precision)


def frozen_parts(adapters: Sequence[Adapter], precision: Precision) -> dict[str, float]:
    """Adapters that do not train: in fp32, and joined in the type that is computed in."""
    size = sum(adapter.parameters for adapter in adapters)
    return {"frozen adapters, 32-bit and joined": float((4 + precision.compute) * size)} if size else {}


def layer_bytes(
    shape: ModelShape, batch: ForwardPass, precision: Precision, own: Adapter | None, below: Sequence[Adapter] = ()
) -> float:
    """What one decoder layer keeps for its backward pass when nothing of it is computed twice."""
    b, hidden, inner = precision.compute, shape.hidden, shape.intermediate
    by_token = (
        2 * 4 * hidden  # what both norms are given, in fp32
        + 2 * b * hidden  # what they give to the linear layers, which the adapters keep
        + 4 * shape.heads  # log-sum-exp of the scores
        + 4 * b * inner  # gate, its activation, up, and their product
    )
    if shape.qk_norm:
        by_token += (4 + b) * (shape.query_size + shape.kv_size)
    for adapter in (*below, *([own] if own else [])):
        by_token += b * adapter.rank * adapter.modules
    if own and own.dropout:
        by_token += (b + 1) * sum(rows for rows, _ in shape.linears.values())
    return batch.positions * by_token + attention_bytes(shape, batch, precision)


def attention_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """What a layer's attention keeps: queries, keys and values as the kernel is given them, and its output."""
    b, queries = precision.compute, batch.positions * shape.query_size
    if not batch.by_segment:
        # Keys and values are repeated for each query's head, and every layer makes its own additive mask.
        return b * (4.0 * queries + batch.rows * batch.width**2)
    assert batch.keys is not None
    if precision.flash:
        return b * (2.0 * queries + 2 * batch.keys * shape.kv_size)
    # Segment by segment: keys and values repeated, outputs once by segment and once joined.
    return b * (3.0 * queries + 2 * batch.keys * shape.query_size)


def _mask_bytes(batch: ForwardPass) -> float:
    return 0.0 if batch.by_segment else float(batch.rows * batch.width**2)


def activation_bytes(
    shape: ModelShape,
    batch: ForwardPass,
    precision: Precision,
    own: Adapter,
    below: Sequence[Adapter] = (),
    unchecked: int = 0,
) -> float:
    """Most bytes alive in a training step beyond weights, adapters, gradients and optimiser.

    Args:
        unchecked: Layers whose activations are kept; those of all others are computed again.
    """
    b, tokens, hidden = precision.compute, batch.positions, shape.hidden
    layer = layer_bytes(shape, batch, precision, own, below)
    checked = shape.layers - unchecked
    # The residual stream at the entrance of each checked layer, and once more at the end.
    entrances = (checked + 1) * b * tokens * hidden + _mask_bytes(batch)
    kept = entrances + unchecked * layer
    final = (4 + b) * tokens * hidden  # the last norm's input in fp32, and its output
    head = final + max(chunk_bytes(shape, batch, b) + b * batch.targets * hidden, 2 * b * batch.targets * hidden)
    norm = final + 5 * 4 * tokens * hidden  # fp32 gradients inside the last norm
    # While a layer goes back: its largest matrix in 16 bits again, gradients of the product inside its MLP and of the
    # residual stream. The last layers are the ones that are kept, and they are gone when the first one is recomputed.
    weight = shape.largest_linear * b if precision.method != "none" else 0
    going_back = weight + tokens * b * (shape.intermediate + 2 * hidden)
    recomputed = entrances + layer + going_back if checked else 0
    return max(kept + head, kept + norm, kept + going_back if unchecked else 0, recomputed)


def forward_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """Most bytes alive in a pass without gradients, log-probabilities included."""
    b, tokens, hidden = precision.compute, batch.positions, shape.hidden
    weight = shape.largest_linear * b if precision.method != "none" else 0
    stream = tokens * hidden * (2 * b + 4) + _mask_bytes(batch)
    attention = stream + attention_bytes(shape, batch, precision) + 2 * b * tokens * shape.query_size
    mlp = stream + 4 * b * tokens * shape.intermediate
    head = tokens * hidden * (4 + 2 * b) + chunk_bytes(shape, batch, b)
    return max(attention + weight, mlp + weight, head)


def chunk_bytes(shape: ModelShape, batch: ForwardPass, b: int) -> float:
    """Logits of a chunk, in the compute type and in fp32."""
    return min(CHUNK_ROWS, batch.targets) * shape.vocab * (4 + b)


def cache_bytes(shape: ModelShape, sequences: int, length: int, precision: Precision) -> float:
    """Keys and values of generation; while they grow, one layer's are there twice."""
    return 2.0 * precision.compute * shape.kv_size * (shape.layers + 1) * sequences * length
