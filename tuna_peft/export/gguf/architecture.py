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
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
# RoPE scalings that llama.cpp computes as transformers does, where it is not all but longrope.
_ROPE_TYPES = {
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "gemma3_text": ("default", "linear"),
    "phi3": ("default", "longrope"),
}
_ACTIVATIONS = {"gemma3_text": "gelu_pytorch_tanh"}  # of the others: silu
# Fixed in llama.cpp's Gemma 3: every sixth layer attends to everything, the others rotate by this base.
_GEMMA_PERIOD, _GEMMA_LOCAL_THETA = 6, 10_000.0


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

    def stored_offset(self, name: str) -> float:
        """What the file adds to the tensor `name`: Gemma's norms multiply by 1 + weight, llama.cpp's by the weight."""
        return 1.0 if self.arch is gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight") else 0.0

    def rope_tensors(self) -> dict[str, np.ndarray]:
        """Divisors of the rotary frequencies by tensor name, each `(rotated / 2,)` in fp32; empty for plain RoPE."""
        rope = _rope(self.config)
        if rope["rope_type"] == "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, "cpu")
            exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
            plain = 1.0 / rope["rope_theta"] ** exponents
            return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
        if rope["rope_type"] == "longrope":
            return {f"rope_factors_{kind}.weight": np.float32(rope[f"{kind}_factor"]) for kind in ("long", "short")}
        return {}

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
        rope = _rope(config)
        writer.add_rope_dimension_count(int(self.head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        if self.arch is gguf.MODEL_ARCH.GEMMA3:
            writer.add_sliding_window(config.sliding_window)
        if rope["rope_type"] == "longrope":
            _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
            writer.add_rope_scaling_attn_factors(scale)
            writer.add_rope_scaling_orig_ctx_len(_original_context(config))
        elif rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)

    def _context_length(self) -> int:
        longest = self.config.max_position_embeddings
        window = _sliding_window(self.config)
        if window is not None and window < longest:
            # llama.cpp runs these architectures without a window; up to its length there is no difference.
            logger.warning(
                "GGUF: the context length is %d, this model's sliding window: llama.cpp has none here", window
            )
            longest = window
        if _rope(self.config)["rope_type"] == "longrope" and _original_context(self.config) < longest:
            longest = _original_context(self.config)
            # llama.cpp chooses the factors by the context that it is given, transformers by the text's length.
            logger.warning("GGUF: the context length is %d, up to which LongRoPE has its short factors", longest)
        return longest


def _rope(config: Any) -> dict[str, Any]:
    """RoPE's parameters; of Gemma, those of the layers that attend to everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _original_context(config: Any) -> int:
    return _rope(config).get("original_max_position_embeddings") or config.original_max_position_embeddings


def _unsupported(config: Any) -> str | None:
    """The first setting that llama.cpp ignores or computes otherwise."""
    rope = _rope(config)
    kind = rope["rope_type"]
    activation = _ACTIVATIONS.get(config.model_type, "silu")
    found = config.hidden_activation if config.model_type == "gemma3_text" else config.hidden_act
    if found != activation:
        return f"hidden_act {found!r} (it always uses {activation})"
    if kind not in _ROPE_TYPES.get(config.model_type, ("default", "linear", "llama3", "yarn")):
        return f"RoPE scaling {kind!r} in a model of type {config.model_type!r}"
    if config.model_type == "gemma3_text":
        return _unsupported_in_gemma(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and config.model_type != "phi3":
        return f"partial_rotary_factor {rope['partial_rotary_factor']}"
    if kind == "yarn":
        _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        if not math.isclose(scale, 0.1 * math.log(rope["factor"]) + 1.0, rel_tol=1e-6) or not rope.get(
            "truncate", True
        ):
            return "YaRN with an attention_factor, mscale or truncate of its own"
    if config.model_type == "qwen3" and config.attention_bias:
        return "attention_bias in a model of type 'qwen3'"
    return None


def _unsupported_in_gemma(config: Any) -> str | None:
    local = config.rope_parameters["sliding_attention"]
    if local["rope_type"] != "default" or local["rope_theta"] != _GEMMA_LOCAL_THETA:
        return f"RoPE of the sliding layers other than plain with a base of {_GEMMA_LOCAL_THETA:,.0f}"
    periodic = ["full_attention" if (i + 1) % _GEMMA_PERIOD == 0 else "sliding_attention" for i in range(62)]
    if config.layer_types != periodic[: config.num_hidden_layers]:
        return f"layer_types other than every {_GEMMA_PERIOD}th layer with full attention"
    # llama.cpp's scale is 1/sqrt(head_dim), but in the 27B, which it knows by its 62 layers.
    is_27b = config.num_hidden_layers == 62
    scalar = config.hidden_size / config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it uses {scalar:g})"
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias", "use_bidirectional_attention"):
        if getattr(config, name, None):
            return f"{name} in a model of type 'gemma3_text'"
    return None


def _sliding_window(config: Any) -> int | None:
    if config.model_type == "gemma3_text":
        return None  # llama.cpp has it, layer by layer
    if config.model_type in ("qwen2", "qwen3") and not getattr(config, "use_sliding_window", False):
        return None
    return getattr(config, "sliding_window", None)
