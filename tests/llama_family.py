"""Tiny models of the LLaMA family with random weights, each with a tokenizer of its own kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CORPUS = [
    "the cat sat on the mat, and the dog didn't: it's 1234 o'clock",
    "### Instruction:\nName three naïve cafés.\n\n",
] * 3
TEXTS = ["the cat sat on the mat", "it's 12345 o'clock!\n\n  and the  dog", "Name naïve 日本 🙂<|end|>"]
# transformers' GGUF tokenizer loses added tokens with spaces in them, and a SentencePiece text's own first space.
TEXTS_FOR_LLAMA_CPP = [*TEXTS, "### Instruction:\nName", " x"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
ROPE_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
ROPE_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

ROPE_GEMMA = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# Of 16 numbers of a head 12 are rotated, in pairs.
ROPE_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 256, "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
}  # fmt: skip

# Family -> configuration and the kind of its tokenizer.
FAMILY: dict[str, tuple[type, dict[str, Any], str]] = {
    "llama": (LlamaConfig, {}, "sentencepiece"),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}, "llama3"),
    "llama-bias": (LlamaConfig, {"attention_bias": True}, "gpt2"),
    "mistral": (MistralConfig, {"sliding_window": 128, "head_dim": 32}, "sentencepiece"),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}, "qwen2"),
    "qwen3": (Qwen3Config, {"head_dim": 128}, "qwen2"),
    "gemma3": (
        Gemma3TextConfig,
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE_GEMMA,
        },
        "gemma",
    ),
    "phi3": (Phi3Config, {"sliding_window": 128}, "phi3"),
    "phi4": (
        Phi3Config,
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": ROPE_LONG,
        },
        "phi4",
    ),
}


SENTENCEPIECE = ("sentencepiece", "metaspace", "gemma", "phi3")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind: `sentencepiece`, `metaspace`, `gemma`, `phi3`, `llama3`, `qwen2`, `gpt2`, `phi4`,
    `phi4-mini`.

    The first four are SentencePiece's BPE. A space is put before every text between special tokens, at the beginning
    only (LLaMA 2 in transformers 5), nowhere, or as in the first with white space after special tokens dropped.
    """
    special = ["<unk>", "<s>", "</s>"]
    if kind in SENTENCEPIECE:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += bytes_
    else:
        backend = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        cut = {"llama3": LLAMA3, "qwen2": QWEN2, "phi4": LLAMA3, "phi4-mini": O200K}.get(kind)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
        backend.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated"), level]) if cut else level
        )
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, show_progress=False,
        initial_alphabet=[] if kind in SENTENCEPIECE else pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    if kind in SENTENCEPIECE:
        # Training marks the bytes as added tokens; SentencePiece has them in the vocabulary only.
        model = backend.model
        plain = Tokenizer(model)
        plain.normalizer, plain.decoder = backend.normalizer, backend.decoder
        if kind == "metaspace":
            plain.normalizer = None
            plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        elif kind == "gemma":
            plain.normalizer = normalizers.Replace(" ", "▁")
            plain.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
            plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        backend = plain
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=kind == "phi3")])
    if kind == "phi3":
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    if kind not in ("metaspace", "phi3"):  # after such a token, llama.cpp puts a space that transformers does not
        backend.add_tokens([AddedToken("### Instruction:\n", normalized=False)])
    if kind != "qwen2":
        backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def write_model(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Saves a model of the family and its tokenizer, with more embedding rows than tokens, and returns its folder."""
    torch.manual_seed(seed)
    config_class, settings, kind = FAMILY[family]
    tokenizer = make_tokenizer(kind)
    config = config_class(**{**COMMON, "vocab_size": len(tokenizer) + 5, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):  # else zeros and ones: a lost or misplaced one would not show
            torch.nn.init.normal_(parameter.data, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).model_type == config.model_type
    return folder
