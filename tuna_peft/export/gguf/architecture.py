"""What llama.cpp must know of a model's shape: its architecture's name, sizes and rotary embedding.

A model whose configuration asks for something that llama.cpp would compute otherwise is refused by name: a file that
loads and answers slightly wrong is worse than none.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tuna_peft.errors import UserError

logger = logging.getLogger("tuna_peft")

# transformers' model types, and what llama.cpp calls the same network.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


@dataclass(frozen=True)
class Architecture:
    """A model that llama.cpp can run.

    Attributes:
        config: The model's transformers configuration.
        arch: llama.cpp's name for it, as the `gguf` package lists it.
    """

    config: Any
    arch: gguf.MODEL_ARCH

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Checks a transformers configuration.

        Raises:
            UserError: llama.cpp has no such architecture, or this variant of it would compute something else.
        """
        if config.model_type not in ARCHITECTURES:
            raise UserError(
                f"a model of type {config.model_type!r} cannot be written as GGUF",
                fix=f"Supported: {', '.join(ARCHITECTURES)}. For others use llama.cpp's convert_hf_to_gguf.py.",
            )
        if reason := _unsupported(config):
            raise UserError(f"llama.cpp would compute something else: {reason}", fix="Serve the merged model itself.")
        return cls(config, ARCHITECTURES[config.model_type])

    @property
    def name(self) -> str:
        """`llama`, `qwen2` ...: the prefix of the file's keys."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def rotated_heads(self, name: str) -> int | None:
        """How many heads of the tensor `name` (transformers' spelling) are stored in another order in the file.

        transformers rotates the first half of a head against the second, llama.cpp's `llama` architecture even
        against odd positions; the rows of queries and keys move accordingly. None for all other tensors.
        """
        if self.arch is not gguf.MODEL_ARCH.LLAMA:
            return None
        projection = name.split(".")[-2]
        return {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(projection)

    def rope_factors(self) -> np.ndarray | None:
        """LLaMA 3's divisors of the rotary frequencies, `(head_dim / 2,)` in fp32; None where there are none."""
        if self.config.rope_parameters["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, "cpu")
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        plain = 1.0 / self.config.rope_parameters["rope_theta"] ** exponents
        return (plain / scaled.numpy()).astype(np.float32)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Writes sizes and rotary embedding as the file's metadata."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self._context_length())
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        rope = config.rope_parameters
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)

    def _context_length(self) -> int:
        window = _sliding_window(self.config)
        if window is None or window >= self.config.max_position_embeddings:
            return self.config.max_position_embeddings
        # llama.cpp runs these architectures without a window; up to its length there is no difference.
        logger.warning("GGUF: the context length is %d, this model's sliding window: llama.cpp has none here", window)
        return window


def _unsupported(config: Any) -> str | None:
    """The first setting that llama.cpp ignores or computes otherwise."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act!r} (it always uses silu)"
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"RoPE scaling {kind!r} (default, linear, llama3 and yarn are supported)"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor {rope['partial_rotary_factor']}"
    if kind == "llama3" and config.model_type not in ("llama", "mistral"):
        return f"RoPE scaling 'llama3' in a model of type {config.model_type!r}"
    if kind == "yarn":
        _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        if not math.isclose(scale, 0.1 * math.log(rope["factor"]) + 1.0, rel_tol=1e-6) or not rope.get(
            "truncate", True
        ):
            return "YaRN with an attention_factor, mscale or truncate of its own"
    if config.model_type == "qwen3" and config.attention_bias:
        return "attention_bias in a model of type 'qwen3'"
    return None


def _sliding_window(config: Any) -> int | None:
    if config.model_type in ("qwen2", "qwen3") and not getattr(config, "use_sliding_window", False):
        return None
    return getattr(config, "sliding_window", None)
