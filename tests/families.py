"""Tiny random models and encoded rows."""

import torch
import transformers
from transformers import AutoModelForCausalLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral-window": ("MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3-window": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
                                     "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "head_dim": 16,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip
# Families whose logits are not `hidden @ weight.T + bias`. The values are far from "no effect", and differ.
CHANGED_LOGITS = {
    "granite": ("GraniteConfig", {"logits_scaling": 0.25}),
    "cohere": ("CohereConfig", {"logit_scale": 3.0}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.5, "sliding_window": 4}),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 3.0}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 0.3, "sliding_window": 4, "head_dim": 16}),
}


def make_model(family="llama", attn_implementation="sdpa", **overrides):
    """A random model of a family; the same seed every time."""
    name, extra = (FAMILIES | CHANGED_LOGITS)[family]
    config = getattr(transformers, name)(**{**SMALL, **extra, **overrides})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def make_rows(count=4, *, seed=0, n=(2, 4), prompt=(1, 9), response=(1, 8), vocabulary=61):
    """Encoded ranked rows with random tokens, lengths, numbers of responses and ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def tokens(length):
        return torch.randint(3, 3 + vocabulary, (length,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        size = draw(*n)
        ranks = [0]
        for _ in range(size - 1):
            ranks.append(ranks[-1] + draw(0, 1))
        ranks[-1] = max(ranks[-1], 1)
        rows.append({
            "prompt_ids": [1, *tokens(draw(*prompt))],
            "completions_ids": [[*tokens(draw(*response)), 2] for _ in range(size)],
            "completion_skips": [draw(0, 1) for _ in range(size)],
            "ranks": ranks,
            "reference_ids": [*tokens(draw(*response)), 2],
            "reference_skip": 0,
        })  # fmt: skip
    return rows
