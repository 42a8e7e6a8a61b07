"""Bytes of passes without gradients: log-probabilities of given responses, and generation."""

from __future__ import annotations

import math

from tuna_peft.limits import CACHE_ROOM
from tuna_peft.planning.memory import Precision, attention_bytes, chunk_bytes, dequantised_bytes, mask_bytes
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass

# Tokens by which a cache grows: its room, and the token that it grows for.
_CACHE_STEP = CACHE_ROOM + 1
# Bytes beside a logit while a token is drawn: the logits in fp32, and a 64-bit random number through its rounds
# (`models/generation/generate.py`); with `top_p` the sorted vocabulary beside it. Measured on meta tensors.
_DRAWN, _DRAWN_BY_TOP_P = 28, 41


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
