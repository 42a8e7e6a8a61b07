"""Operations counted and the fewest possible; bytes of weights.

Only matrix products count, a multiplication and an addition each. Attention's backward pass counts as the four
products that the mathematics asks for; memory-efficient kernels make a fifth, which `kernel` includes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import bitsandbytes  # noqa: F401 (defines its operators)
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig

from benchmarks.shapes import LORA_RANK
from benchmarks.workloads import Group, response_tokens

_aten = torch.ops.aten


def _attention(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _quantized_linear(x, weight, shape, *args, **kwargs) -> int:
    return 2 * math.prod(x) * shape[0]


def _product_added_in_place(total, a, b, *args, **kwargs) -> int:
    return 2 * math.prod(a) * b[-1]


# Operators that torch does not count: attention on CPUs, products with a 4-bit weight `(out, in)`, and those added in
# place.
_MORE_OPERATORS = {
    _aten.addmm_: _product_added_in_place,
    torch.ops.bitsandbytes.gemm_4bit: _quantized_linear,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

# NF4 in blocks of 64 weights with double quantization: half a byte a weight, a one-byte scale a block, and an fp32
# scale for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class Counted:
    """FLOPs of a step.

    Attributes:
        model: What the mathematics requires.
        kernel: What the kernels compute: fused attention recomputes its scores in the backward pass.
    """

    model: float = 0.0
    kernel: float = 0.0


@contextmanager
def counted() -> Iterator[Counted]:
    """Counts the FLOPs inside; the result is there when the context has ended."""
    result = Counted()
    with FlopCounterMode(display=False, custom_mapping=_MORE_OPERATORS) as counter:
        yield result
    by_operator = counter.get_flop_counts().get("Global", {})
    result.kernel = float(sum(by_operator.values()))
    backward = sum(flops for operator, flops in by_operator.items() if _is_attention_backward(str(operator)))
    # Five matrix products in the backward pass of fused attention, of which one recomputes the scores.
    result.model = result.kernel - backward / 5


def _is_attention_backward(operator: str) -> bool:
    return "attention" in operator and operator.endswith("backward")


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of a model, by part."""

    body: int
    head: int
    embedding: int
    adapters: int


def parameters_of(config: LlamaConfig) -> Parameters:
    """LLaMA's linear layers, head and embedding (untied), and LoRA on all layers of the body; norms are left out."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), *[(hidden, inner)] * 3]
    vocabulary = config.vocab_size * hidden
    return Parameters(
        body=config.num_hidden_layers * sum(a * b for a, b in shapes),
        head=vocabulary,
        embedding=vocabulary,
        adapters=config.num_hidden_layers * sum(LORA_RANK * (a + b) for a, b in shapes),
    )


def limit(config: LlamaConfig, groups: list[Group]) -> float:
    """The minimum FLOPs of a gradient step: every unique token is computed once, nothing is recomputed.

    With U unique tokens, R response tokens, and A query-key pairs (a token also attends to itself):

        2 * 2 * body * U            forward pass, and gradient of the activations (the base is frozen)
        + 3 * 2 * adapters * U      the trained adapter also needs the gradient of its weights
        + 2 * 2 * head * R          only positions that predict a response's token need logits
        + 3 * 2 * 2 * hidden * layers * A
    """
    size = parameters_of(config)
    unique = pairs = 0
    for group in groups:
        prompt = len(group["prompt_ids"])
        unique += prompt
        pairs += prompt * (prompt + 1) // 2
        for length in map(len, group["completions_ids"]):
            unique += length
            pairs += length * prompt + length * (length + 1) // 2
    return (
        4.0 * size.body * unique
        + 6.0 * size.adapters * unique
        + 4.0 * size.head * response_tokens(groups)
        + 12.0 * config.hidden_size * config.num_hidden_layers * pairs
    )


def weight_bytes(config: LlamaConfig) -> float:
    """The frozen weights: an NF4 body, 16-bit embedding and head."""
    size = parameters_of(config)
    return size.body * NF4_BYTES + 2.0 * (size.head + size.embedding)


def training_state_bytes(config: LlamaConfig) -> float:
    """fp32 adapters, their gradients and AdamW's two moments."""
    return 16.0 * parameters_of(config).adapters
