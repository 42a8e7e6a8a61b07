"""Bytes of memory of a run: weights, adapters, optimizer states, and the tensors of each kind of forward pass.

`tuna_peft.planning.plan` adds these up phase by phase. Every factor counts the tensors that PyTorch holds at that
moment; `python -m benchmarks.accuracy` compares the sums with peaks of the real code on PyTorch's `meta` device, and
docs/planner-accuracy.md shows the result.

Letters in comments: T tokens of a forward pass, D hidden size, I inner size of the MLP, Q and K sizes of all queries
and of all keys of a token, b bytes of a number in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.limits import CACHE_ROOM, CHUNK_ROWS, GIB, QUANTIZATION_BLOCK, SCALES_BLOCK, packs_fp16
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass

# Tokens and vocabulary entries that TRL's fused head computes at a time; a test compares them with TRL's constants.
SUPERVISED_TILE = (4096, 32768)
# GPU memory of the CUDA context, the libraries' kernels and their workspaces: others report 0.35 to 0.6 GiB. Not
# measured with this package.
CUDA_CONTEXT = 0.5 * GIB
# Memory that the allocator cannot use because its blocks never fit exactly, as a share of the temporary tensors. An
# assumption: it has not been measured.
FRAGMENTATION = 0.08
# Main memory of a Python process with torch and transformers, before any model, and of what its allocator keeps:
# measured with the quickstart on a CPU.
PROCESS = 0.8 * GIB
# Tokens by which a key-value cache grows: the free space, and the token that it grows for.
_CACHE_STEP = CACHE_ROOM + 1
# Temporary bytes for each logit while a token is sampled: the logits in fp32, and a 64-bit random number with the
# intermediate results of its hash (`models/generation/generate.py`); with `top_p` also the sorted vocabulary. Fitted
# to peaks on the `meta` device.
_SAMPLING, _SAMPLING_BY_TOP_P = 28, 41
# Bytes of optimizer state for each trainable parameter, by the optimizer's name; AdamW (two fp32 moments, 8 bytes) is
# the default.
_OPTIMIZERS = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "ademamix_8bit": 3, "lion_8bit": 1,
    "paged_lion_8bit": 1, "lion": 4, "sgd": 0, "adafactor": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """How numbers are stored and computed.

    Attributes:
        method: Quantization of the base: `nf4`, `fp4`, `int8` or `none`.
        double_quant: Whether the scales of a 4-bit base are quantized too.
        compute: Bytes of a number in the compute dtype: 2 on a GPU, 4 on a CPU.
        flash: Whether FlashAttention is used (Ampere GPUs and later).
    """

    method: str
    double_quant: bool
    compute: int
    flash: bool = False

    @property
    def body(self) -> float:
        """Bytes of a parameter of the decoder's linear layers."""
        if self.method == "none":
            return self.compute
        if self.method == "int8":
            return 1.0  # the scale of each row is negligible
        # A scale is in fp32; under double quantization it has one byte, and each block of scales an fp32 scale.
        scale = 1 + 4 / SCALES_BLOCK if self.double_quant else 4
        return 0.5 + scale / QUANTIZATION_BLOCK


@dataclass(frozen=True)
class Adapter:
    """The size of a LoRA adapter.

    Attributes:
        rank: The `r` of LoRA.
        parameters: Parameters in all layers.
        modules: Linear layers of one decoder layer that have an adapter.
        dropout: LoRA dropout.
    """

    rank: int
    parameters: int
    modules: int
    dropout: float = 0.0


def weight_parts(shape: ModelShape, precision: Precision) -> dict[str, float]:
    """Bytes of the frozen base, by part."""
    stored = "16-bit" if precision.compute == 2 else "32-bit"
    method = stored if precision.method == "none" else precision.method
    return {
        f"base layers, {method}": shape.body * precision.body,
        f"embedding, head, norms, {stored}": float(shape.unquantized * precision.compute),
    }


def optimizer_bytes(name: str) -> float:
    """Bytes of optimizer state for each trainable parameter."""
    return _OPTIMIZERS.get(name, 8)


def trainer_parts(own: Adapter, below: Sequence[Adapter], optimizer: str, precision: Precision) -> dict[str, float]:
    """Bytes of adapters, gradients and optimizer states, by part.

    Args:
        own: The adapter that is trained. It and its gradient are in fp32; layers keep a copy in the compute dtype.
        below: The frozen adapters that it is trained on top of.
    """
    parts = {"adapter, its gradient, and its copy in the compute dtype": (8.0 + precision.compute) * own.parameters}
    parts[f"optimizer states ({optimizer})"] = optimizer_bytes(optimizer) * own.parameters
    return parts | frozen_parts(below, precision)


def frozen_parts(adapters: Sequence[Adapter], precision: Precision) -> dict[str, float]:
    """Bytes of adapters that are not trained: in fp32, and concatenated in the compute dtype for the forward pass."""
    size = sum(adapter.parameters for adapter in adapters)
    return {"frozen adapters, 32-bit and concatenated": float((4 + precision.compute) * size)} if size else {}


def layer_bytes(
    shape: ModelShape, batch: ForwardPass, precision: Precision, own: Adapter | None, below: Sequence[Adapter] = ()
) -> float:
    """Activations that one decoder layer keeps for its backward pass without gradient checkpointing."""
    b, hidden, inner = precision.compute, shape.hidden, shape.intermediate
    by_token = (
        shape.norms * 4 * hidden  # an RMS norm computes in fp32 and keeps its fp32 input
        + 2 * b * hidden  # outputs of the norms before attention and MLP: inputs of linear layers, kept for LoRA's A
        + 4 * shape.heads  # the log-sum-exp of each head's scores, in fp32
        + 4 * b * inner  # gate, activation of the gate, up, and their product
    )
    if shape.head_norms:
        # The norms of queries and keys: inputs in fp32, outputs in the compute dtype.
        by_token += (4 + b) * (shape.query_size + shape.kv_size)
    for adapter in (*below, *([own] if own else [])):
        by_token += b * adapter.rank * adapter.modules  # outputs of LoRA's A
    if own and own.dropout:
        # Each linear layer gets its own copy of the input after dropout (b), and a mask (1 byte).
        by_token += (b + 1) * sum(rows for rows, _ in shape.linears.values())
    return batch.positions * by_token + attention_bytes(shape, batch, precision)


def attention_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """What a layer's attention keeps: queries, keys and values as the kernel reads them, and its output."""
    b, queries = precision.compute, batch.positions * shape.query_size
    if not batch.by_segment:
        # Queries, output, and keys and values, which are repeated for each head: 4 T Q. Every layer makes its own
        # additive mask. In Phi-3 queries, keys and values are one matrix product; where keys and values need not be
        # repeated, the values are a view that keeps the whole product alive.
        whole = shape.family == "phi3" and shape.heads == shape.kv_heads
        product = batch.positions * (shape.query_size + shape.kv_size) if whole else 0
        return b * (4.0 * queries + batch.rows * batch.width**2 + product)
    assert batch.keys is not None
    # Each segment has its own copy of the keys and values that it attends to.
    if precision.flash:
        return b * (2.0 * queries + 2 * batch.keys * shape.kv_size)  # queries and output
    # One kernel call for each segment: keys and values repeated for each head, the outputs once for each segment and
    # once concatenated.
    return b * (3.0 * queries + 2 * batch.keys * shape.query_size)


def mask_bytes(shape: ModelShape, batch: ForwardPass) -> float:
    """Boolean attention masks: one for each kind of layer; none where attention is computed segment by segment."""
    return 0.0 if batch.by_segment else float(shape.masks * batch.rows * batch.width**2)


def dequantized_bytes(shape: ModelShape, precision: Precision) -> float:
    """The largest weight matrix after dequantization to the compute dtype; it exists only during a layer's product."""
    return 0.0 if precision.method == "none" else float(shape.largest_linear * precision.compute)


def activation_bytes(
    shape: ModelShape,
    batch: ForwardPass,
    precision: Precision,
    own: Adapter,
    below: Sequence[Adapter] = (),
    kept_layers: int = 0,
    *,
    supervised: bool = False,
) -> float:
    """Peak bytes of a training step beyond weights, adapters, gradients and optimizer states.

    The peak is one of four moments: the loss, the backward pass of the last norm, that of a layer that kept its
    activations, or that of the first layer that recomputes them.

    Args:
        kept_layers: Layers that keep their activations; all others use gradient checkpointing.
        supervised: Whether TRL computes the loss, and not the ranking trainer.
    """
    b, tokens, hidden = precision.compute, batch.positions, shape.hidden
    layer = layer_bytes(shape, batch, precision, own, below)
    checkpointed = shape.layers - kept_layers
    # The input of each checkpointed layer, and the output of the last layer.
    inputs = (checkpointed + 1) * b * tokens * hidden + mask_bytes(shape, batch)
    kept = inputs + kept_layers * layer
    final = (4 + b) * tokens * hidden  # input of the last norm in fp32, and its output
    if supervised:
        head = final + supervised_head_bytes(shape, batch, b)
    else:
        # The hidden states that predict the response tokens, with a chunk of logits or with their gradient.
        head = final + max(chunk_bytes(shape, batch, b) + b * batch.targets * hidden, 2 * b * batch.targets * hidden)
    norm = final + 5 * 4 * tokens * hidden  # five fp32 tensors are alive in the backward pass of the last norm
    # In the backward pass of a layer: gradients of the residual stream and of the MLP's inside, and a dequantized
    # matrix. The peak is at the down projection, with the gradient of its input; or, where gate and up are one larger
    # matrix (Phi-3), at that one, when the two inner tensors behind it are freed.
    inner = tokens * b * shape.intermediate
    down = math.prod(shape.linears["down_proj"]) * b if precision.method != "none" else 0
    backward = 2 * b * tokens * hidden + max(down + inner, dequantized_bytes(shape, precision) - 2 * inner)
    # The kept layers are the last ones: their activations are freed before the first layer is recomputed.
    recomputed = inputs + layer + backward if checkpointed else 0
    return max(kept + head, kept + norm, kept + backward if kept_layers else 0, recomputed)


def chunk_bytes(shape: ModelShape, batch: ForwardPass, b: int) -> float:
    """A chunk of logits, in the compute dtype and in fp32."""
    return min(CHUNK_ROWS, batch.targets) * shape.vocab * (4 + b)


def supervised_head_bytes(shape: ModelShape, batch: ForwardPass, b: int) -> float:
    """TRL's fused head in its backward pass: hidden states of tokens that carry loss, their fp32 gradient, a tile of
    logits."""
    tile = min(batch.targets, SUPERVISED_TILE[0]) * min(shape.vocab, SUPERVISED_TILE[1])
    return batch.targets * shape.hidden * (4 + b) + b * tile


def forward_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """Peak bytes inside the layers of a forward pass without gradients."""
    b, tokens = precision.compute, batch.positions
    weight = dequantized_bytes(shape, precision)
    # Four tensors of the hidden size: the embeddings, the residual stream, the output of a norm, and one temporary.
    # Two tensors (sine and cosine) of rotary embeddings, and a mask, for each kind of layer.
    stream = b * tokens * (4 * shape.hidden + 2 * shape.masks * shape.head_dim) + mask_bytes(shape, batch)
    inner = b * tokens * shape.intermediate
    # Gate and up with a dequantized matrix; or the activation of the gate, up and their product. In Phi-3 gate and up
    # are one tensor: the gate stays alive with up.
    mlp = max(2 * inner + weight, (4 if shape.family == "phi3" else 3) * inner)
    return stream + max(mlp, attention_bytes(shape, batch, precision))


def scoring_bytes(shape: ModelShape, batch: ForwardPass, precision: Precision) -> float:
    """Peak bytes while the log-probabilities of given responses are computed."""
    b = precision.compute
    # The last hidden states, those that predict response tokens, and a chunk of logits.
    head = b * (batch.positions + batch.targets) * shape.hidden + chunk_bytes(shape, batch, b)
    return max(forward_bytes(shape, batch, precision), head)


def logits_bytes(shape: ModelShape, tokens: int, precision: Precision) -> float:
    """Peak bytes while the logits of all tokens of a text are computed at once."""
    batch = ForwardPass(1, tokens, tokens)
    # The logits, and the hidden states before and after the last norm.
    return max(forward_bytes(shape, batch, precision), precision.compute * tokens * (shape.vocab + 2 * shape.hidden))


def dense_bytes(shape: ModelShape, precision: Precision) -> float:
    """The dense copy of the layers that a model holds while it generates; 0 where it would not be faster.

    An unquantized stack in fp32 adds its adapters to the copy. A copy in fp16, for FBGEMM, has the head too.
    """
    if packs(shape, precision):
        return 2.0 * ((shape.body if precision.method != "int8" else 0) + shape.head)
    gains = precision.method in ("nf4", "fp4") or (precision.method == "none" and precision.compute == 4)
    return float(shape.body * precision.compute) if gains else 0.0


def packs(shape: ModelShape, precision: Precision) -> bool:
    """Whether the dense copy is in fp16, as `tuna_peft.models.generation.dense` decides."""
    return precision.compute == 4 and packs_fp16(shape.hidden)


def cache_bytes(shape: ModelShape, sequences: int, tokens: int, precision: Precision) -> float:
    """Keys and values of one layer."""
    return 2.0 * precision.compute * shape.kv_size * sequences * tokens


def _all_caches(shape: ModelShape, sequences: int, tokens: int, allocated: int, precision: Precision) -> float:
    """Keys and values of all layers: `allocated` tokens in those that grow in place, `tokens` in sliding ones."""
    growing, sliding = (cache_bytes(shape, sequences, count, precision) for count in (allocated, tokens))
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
    """Peak bytes, by part, while `n` responses to each of `prompts` prompts are generated in one batch.

    The peak is one of two moments: the forward pass over the prompts, or the last generated tokens.

    Args:
        prompt: Tokens of the longest prompt.
        new: Tokens of the longest response.
        greedy: Whether the most likely token is taken; else it is sampled.
        top_p: Whether nucleus sampling sorts the vocabulary.
    """
    b, sequences = precision.compute, prompts * n
    prefill = {
        f"keys and values of {prompts} x {prompt:,} tokens": _all_caches(
            shape, prompts, prompt, prompt + _CACHE_STEP, precision
        ),
        "a forward pass over the prompts": max(
            forward_bytes(shape, ForwardPass(prompts, prompt, prompts, None), precision),
            # Logits of the last token, and the hidden states before and after the last norm.
            b * prompts * (shape.vocab + 2 * prompt * shape.hidden),
        ),
    }
    allocated = prompt + _CACHE_STEP * math.ceil(new / _CACHE_STEP)
    choice = b if greedy else (_SAMPLING_BY_TOP_P if top_p else _SAMPLING) + b
    step = dequantized_bytes(shape, precision) + b * sequences * (3 * shape.intermediate + 4 * shape.hidden)
    decoding = {
        f"keys and values of {sequences} x {prompt + new:,} tokens": _all_caches(
            shape, sequences, min(prompt + new, shape.window or allocated), allocated, precision
        ),
        # One of three: the old cache of a layer while it is copied into a larger one, the forward pass of one token,
        # or the choice of a token from the logits.
        "the next tokens": max(
            cache_bytes(shape, sequences, allocated - _CACHE_STEP, precision), step, sequences * shape.vocab * choice
        ),
    }
    return max(prefill, decoding, key=lambda parts: sum(parts.values()))
