"""The sizes of a model that a plan needs, from its configuration: without weights and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.limits import context_length

# Decoders (attention, a gated MLP, RMS norms) whose planned memory has been compared with measured peaks.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
# Other models that users are likely to try, and why there is no plan.
_REFUSED = {
    "gemma2": "its attention scores are soft-capped, so they are held in memory, which the plan does not count",
    "gemma3": "with its vision model it is not a causal language model; `run` rejects it too",
}
_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


class UnplannedModel(UserError):
    """A model that the planner does not support; a run continues without a plan."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab: As in its configuration.
        tied: Whether head and embedding are one matrix.
        family: Its `model_type`, one of `FAMILIES`.
        masks: Kinds of attention layers (sliding-window and full); each kind has its own mask.
        context: Maximum tokens of a sequence; None if the configuration has no limit.
        window: Tokens that a sliding-window layer attends to.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    family: str = "llama"
    masks: int = 1
    context: int | None = None
    window: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> ModelShape:
        """The shape in a `config.json`.

        Raises:
            UnplannedModel: The planner does not support the model.
        """
        family = str(config.get("model_type"))
        experts = any(config.get(key) for key in _MOE_KEYS)
        if family not in FAMILIES or experts:
            reason = "experts stay in 16 bits whatever `quantization` is" if experts else _REFUSED.get(family)
            raise UnplannedModel(
                f"the planner does not know models of type {family!r}{f': {reason}' if reason else ''}",
                where=where,
                fix=f"It knows {', '.join(FAMILIES)}. For other models, watch the memory of the first steps of `run`.",
            )
        gemma = family == "gemma3_text"
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                hidden=hidden,
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or (256 if gemma else hidden // heads),
                vocab=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", gemma)),
                family=family,
                masks=len(set(config.get("layer_types") or ())) or (2 if gemma else 1),
                context=context_length(config),
                window=config.get("sliding_window"),
            )
        except KeyError as error:
            raise UnplannedModel(f"the model's configuration has no {error}", where=where) from error

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """`(in, out)` of the linear layers of one decoder layer, by the names that LoRA's `target_modules` uses."""
        hidden, inner, out = self.hidden, self.intermediate, {"o_proj": (self.query_size, self.hidden)}
        if self.family == "phi3":
            out = {
                "qkv_proj": (hidden, self.query_size + 2 * self.kv_size),
                **out,
                "gate_up_proj": (hidden, 2 * inner),
            }
        else:
            queries, keys = (hidden, self.query_size), (hidden, self.kv_size)
            out = {"q_proj": queries, "k_proj": keys, "v_proj": keys, **out}
            out |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        return {**out, "down_proj": (inner, hidden)}

    @property
    def norms(self) -> int:
        """RMS norms of a layer over the whole hidden size."""
        return 4 if self.family == "gemma3_text" else 2

    @property
    def sliding(self) -> int:
        """Sliding-window layers, whose key-value cache has the size of the window: five of six in Gemma 3."""
        return self.layers - self.layers // 6 if self.family == "gemma3_text" and self.window else 0

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalized for each head."""
        return self.family in ("qwen3", "gemma3_text")

    @property
    def query_size(self) -> int:
        """Size of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Size of all keys, or of all values, of a token."""
        return self.kv_heads * self.head_dim

    @property
    def body(self) -> int:
        """Parameters of the decoder's linear layers, which are quantized."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.vocab * self.hidden

    @property
    def unquantized(self) -> int:
        """Parameters outside the body: embedding, head (once when tied), norms."""
        return self.head * (1 if self.tied else 2) + self.hidden * (self.norms * self.layers + 1)

    @property
    def largest_linear(self) -> int:
        """Parameters of the largest linear layer of a decoder layer."""
        return max(a * b for a, b in self.linears.values())

    def adapter(self, rank: int, targets: str | Sequence[str]) -> int:
        """Parameters of a LoRA adapter.

        Args:
            rank: The `r` of LoRA.
            targets: `all-linear`, or names of linear layers.
        """
        chosen = self.linears if targets == "all-linear" else {name.rpartition(".")[2] for name in targets}
        return self.layers * sum(rank * (a + b) for name, (a, b) in self.linears.items() if name in chosen)


def _shape(*sizes: int, **options: Any) -> ModelShape:
    """hidden, intermediate, layers, heads, key-value heads, vocabulary."""
    hidden, intermediate, layers, heads, kv_heads, vocab = sizes
    return ModelShape(
        hidden, intermediate, layers, heads, kv_heads, options.pop("head_dim", hidden // heads), vocab, **options
    )


# Sizes from each model's published config.json, for planning without a network. Keys are lower-case Hub names without
# the owner; a name that begins with a key has that shape (`Llama-3.1-8B-Instruct`).
KNOWN: dict[str, ModelShape] = {
    "llama-7b": _shape(4096, 11008, 32, 32, 32, 32000, context=2048),
    "llama-13b": _shape(5120, 13824, 40, 40, 40, 32000, context=2048),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000, context=4096),
    "llama-2-13b": _shape(5120, 13824, 40, 40, 40, 32000, context=4096),
    "llama-2-70b": _shape(8192, 28672, 80, 64, 8, 32000, context=4096),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, 128256, tied=True, context=131072),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, 128256, tied=True, context=131072),
    "llama-3.1-8b": _shape(4096, 14336, 32, 32, 8, 128256, context=131072),
    "llama-3.1-70b": _shape(8192, 28672, 80, 64, 8, 128256, context=131072),
    "llama-3.3-70b": _shape(8192, 28672, 80, 64, 8, 128256, context=131072),
    "mistral-7b": _shape(4096, 14336, 32, 32, 8, 32768, context=32768),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, tied=True, context=8192),
    "smollm2-360m": _shape(960, 2560, 32, 15, 5, 49152, tied=True, context=8192),
    "smollm2-1.7b": _shape(2048, 8192, 24, 32, 32, 49152, tied=True, context=8192),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, 151936, tied=True, context=32768),
    "qwen2.5-1.5b": _shape(1536, 8960, 28, 12, 2, 151936, tied=True, context=32768),
    "qwen2.5-3b": _shape(2048, 11008, 36, 16, 2, 151936, tied=True, context=32768),
    "qwen2.5-7b": _shape(3584, 18944, 28, 28, 4, 152064, context=32768),
    "qwen2.5-14b": _shape(5120, 13824, 48, 40, 8, 152064, context=32768),
    "qwen2.5-32b": _shape(5120, 27648, 64, 40, 8, 152064, context=32768),
    "qwen2.5-72b": _shape(8192, 29568, 80, 64, 8, 152064, context=131072),
    "gemma-3-1b": _shape(
        1152,
        6912,
        26,
        4,
        1,
        262144,
        head_dim=256,
        tied=True,
        family="gemma3_text",
        masks=2,
        context=32768,
        window=512,
    ),
    "phi-4": _shape(5120, 17920, 40, 40, 10, 100352, family="phi3", context=16384),
    "phi-3.5-mini": _shape(3072, 8192, 32, 32, 32, 32064, family="phi3", context=131072),
    "phi-3-mini": _shape(3072, 8192, 32, 32, 32, 32064, family="phi3", context=4096),
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8, 151936, head_dim=128, tied=True, family="qwen3", context=40960),
    "qwen3-1.7b": _shape(2048, 6144, 28, 16, 8, 151936, head_dim=128, tied=True, family="qwen3", context=40960),
    "qwen3-4b": _shape(2560, 9728, 36, 32, 8, 151936, head_dim=128, tied=True, family="qwen3", context=40960),
    "qwen3-8b": _shape(4096, 12288, 36, 32, 8, 151936, head_dim=128, family="qwen3", context=40960),
    "qwen3-14b": _shape(5120, 17408, 40, 40, 8, 151936, head_dim=128, family="qwen3", context=40960),
    "qwen3-32b": _shape(5120, 25600, 64, 64, 8, 151936, head_dim=128, family="qwen3", context=40960),
}


def known_shape(model: str) -> ModelShape | None:
    """The shape of a well-known model by its Hub id; None for any other."""
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    for key in sorted(KNOWN, key=len, reverse=True):
        if name == key or name.startswith((key + "-", key + "_")):
            return KNOWN[key]
    return None
