"""Bytes of a run, part by part.

Letters in comments: T tokens of a forward pass, D hidden size, I inner size of the MLP, Q and K sizes of all queries
and of all keys of a token, b bytes of the compute type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.limits import CACHE_ROOM, CHUNK_ROWS, GIB, QUANTIZATION_BLOCK, SCALES_BLOCK
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass

SUPERVISED_TILE = (4096, 32768)  # tokens and vocabulary at a time in TRL's fused head; a test compares

# What the CUDA context, the libraries' kernels and their workspaces take of a card: 0.35 to 0.6 GiB on cards that
# others have reported; not measured here.
CUDA_CONTEXT = 0.5 * GIB
# Blocks that the allocator cannot use, as a share of what comes and goes.
FRAGMENTATION = 0.08
# Python with torch, transformers and the rest, before any model, and what its allocator keeps (the quickstart on CPU).
PROCESS = 0.8 * GIB
# Tokens by which a cache grows: its room, and the token that it grows for.
_CACHE_STEP = CACHE_ROOM + 1
# Bytes beside a logit while a token is drawn: the logits in fp32, and a 64-bit random number through its rounds
# (`models/generation/generate.py`); with `top_p` the sorted vocabulary beside it. Measured on meta tensors.
_DRAWN, _DRAWN_BY_TOP_P = 28, 41
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
        # A scale is in fp32; under double quantization one byte, with an fp32 scale for each block of scales.
        scale = 1 + 4 / SCALES_BLOCK if self.double_quant else 4
        return 0.5 + scale / QUANTIZATION_BLOCK


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
        shape.norms * 4 * hidden  # what the norms are given, in fp32
        + 2 * b * hidden  # what two of them give to the linear layers, which the adapters keep
        + 4 * shape.heads  # log-sum-exp of the scores
        + 4 * b * inner  # gate, its activation, up, and their product
    )
    if shape.head_norms:
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
        # Keys and values are repeated for each head, and every layer makes its own additive mask. Where nothing is
        # repeated, values that came out of one matrix with queries and keys keep the whole product.
        whole = shape.family == "phi3" and shape.heads == shape.kv_heads
        product = batch.positions * (shape.query_size + shape.kv_size) if whole else 0
        return b * (4.0 * queries + batch.rows * batch.width**2 + product)
    assert batch.keys is not None
    if precision.flash:
        return b * (2.0 * queries + 2 * batch.keys * shape.kv_size)
    # Segment by segment: keys and values repeated, outputs once by segment and once joined.
    return b * (3.0 * queries + 2 * batch.keys * shape.query_size)


def mask_bytes(shape: ModelShape, batch: ForwardPass) -> float:
    """Booleans of who sees whom: none by segment, else one mask for each kind of layer."""
    return 0.0 if batch.by_segment else float(shape.masks * batch.rows * batch.width**2)


def dequantised_bytes(shape: ModelShape, precision: Precision) -> float:
    """The largest matrix, in the type that is computed in."""
    return 0.0 if precision.method == "none" else float(shape.largest_linear * precision.compute)


def activation_bytes(
    shape: ModelShape,
    batch: ForwardPass,
    precision: Precision,
    own: Adapter,
    below: Sequence[Adapter] = (),
    unchecked: int = 0,
    *,
    supervised: bool = False,
) -> float:
    """Most bytes alive in a training step beyond weights, adapters, gradients and optimiser.

    Args:
        unchecked: Layers whose activations are kept; those of all others are computed again.
        supervised: TRL takes the loss, not the ranking trainer.
    """
    b, tokens, hidden = precision.compute, batch.positions, shape.hidden
    layer = layer_bytes(shape, batch, precision, own, below)
    checked = shape.layers - unchecked
    # The residual stream at the entrance of each checked layer, and once more at the end.
    entrances = (checked + 1) * b * tokens * hidden + mask_bytes(shape, batch)
    kept = entrances + unchecked * layer
    final = (4 + b) * tokens * hidden  # the last norm's input in fp32, and its output
    if supervised:
        head = final + supervised_head_bytes(shape, batch, b)
    else:
        head = final + max(chunk_bytes(shape, batch, b) + b * batch.targets * hidden, 2 * b * batch.targets * hidden)
    norm = final + 5 * 4 * tokens * hidden  # fp32 gradients inside the last norm
    # While a layer goes back: a matrix in 16 bits again, gradients inside its MLP and of the residual stream. That is
    # behind the product of gate and up; or, where one larger matrix gives both, behind it, when what it gave is gone.
    # The last layers are the ones that are kept, and they are gone when the first one is recomputed.
    inner = tokens * b * shape.intermediate
    down = math.prod(shape.linears["down_proj"]) * b if precision.method != "none" else 0
    going_back = 2 * b * tokens * hidden + max(down + inner, dequantised_bytes(shape, precision) - 2 * inner)
    recomputed = entrances + layer + going_back if checked else 0
    return max(kept + head, kept + norm, kept + going_back if unchecked else 0, recomputed)


def chunk_bytes(shape: ModelShape, batch: ForwardPass, b: int) -> float:
    """Logits of a chunk, in the compute type and in fp32."""
    return min(CHUNK_ROWS, batch.targets) * shape.vocab * (4 + b)


def supervised_head_bytes(shape: ModelShape, batch: ForwardPass, b: int) -> float:
    """TRL's fused head going back: the states that carry loss, their gradient in fp32, and a tile of logits."""
    tile = min(batch.targets, SUPERVISED_TILE[0]) * min(shape.vocab, SUPERVISED_TILE[1])
    return batch.targets * shape.hidden * (4 + b) + b * tile


def forward_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """Most bytes alive inside the layers of a pass."""
    b, tokens = precision.compute, batch.positions
    weight = dequantised_bytes(shape, precision)
    # The model's input, the residual stream, and what a norm gives, with one more while it is made; rotary embeddings
    # and masks for each kind of layer.
    stream = b * tokens * (4 * shape.hidden + 2 * shape.masks * shape.head_dim) + mask_bytes(shape, batch)
    inner = b * tokens * shape.intermediate
    # Gate and up beside their matrix; or the activation, up and their product, and the gate where it is one with up.
    mlp = max(2 * inner + weight, (4 if shape.family == "phi3" else 3) * inner)
    return stream + max(mlp, attention_bytes(shape, batch, precision))


def scoring_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """Most bytes alive while the log-probabilities of responses are taken."""
    b = precision.compute
    head = b * (batch.positions + batch.targets) * shape.hidden + chunk_bytes(shape, batch, b)
    return max(forward_bytes(shape, batch, precision), head)


def logits_bytes(shape: ModelShape, tokens: int, precision: Precision) -> float:
    """Most bytes alive while a text's logits are all made."""
    batch = ForwardPass(1, tokens, tokens)
    return max(forward_bytes(shape, batch, precision), precision.compute * tokens * (shape.vocab + 2 * shape.hidden))


def cache_bytes(shape: ModelShape, sequences: int, tokens: int, precision: Precision) -> float:
    """Keys and values of one layer."""
    return 2.0 * precision.compute * shape.kv_size * sequences * tokens


def _all_caches(shape: ModelShape, sequences: int, tokens: int, room: int, precision: Precision) -> float:
    """Keys and values of all layers: those that grow in place have room, sliding ones hold what is there."""
    growing, sliding = (cache_bytes(shape, sequences, held, precision) for held in (room, tokens))
    return (shape.layers - shape.sliding) * growing + shape.sliding * sliding


def generation_bytes(
    shape: ModelShape,
    precision: Precision,
    *,
    prompts: int,
    n: int,
    prompt: int,
    new: int,
    greedy: bool = True,
    top_p: bool = False,
) -> dict[str, float]:
    """Most bytes alive while `n` responses of `new` tokens are written to each of some prompts, by part.

    It is one of two moments: the prompts are read, or the last tokens are written.
    """
    b, sequences = precision.compute, prompts * n
    reading = {
        f"keys and values of {prompts} x {prompt:,} tokens": _all_caches(
            shape, prompts, prompt, prompt + _CACHE_STEP, precision
        ),
        "a forward pass over the prompts": max(
            forward_bytes(shape, ForwardPass(prompts, prompt, prompts, None), precision),
            b * prompts * (shape.vocab + 2 * prompt * shape.hidden),
        ),
    }
    room = prompt + _CACHE_STEP * math.ceil(new / _CACHE_STEP)
    drawn = b if greedy else (_DRAWN_BY_TOP_P if top_p else _DRAWN) + b
    step = dequantised_bytes(shape, precision) + b * sequences * (3 * shape.intermediate + 4 * shape.hidden)
    writing = {
        f"keys and values of {sequences} x {prompt + new:,} tokens": _all_caches(
            shape, sequences, min(prompt + new, shape.window or room), room, precision
        ),
        # A layer's old room, while it moves into a larger one; or one step; or the choice of a token.
        "the next tokens": max(
            cache_bytes(shape, sequences, room - _CACHE_STEP, precision), step, sequences * shape.vocab * drawn
        ),
    }
    return max(reading, writing, key=lambda parts: sum(parts.values()))
