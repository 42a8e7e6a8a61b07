"""A Hugging Face fast tokenizer as llama.cpp reads it.

Two kinds exist in the LLaMA family: SentencePiece BPE (LLaMA 1 and 2, Mistral) and byte-level BPE (LLaMA 3, Qwen,
Mistral Nemo). The fast tokenizer that the model was trained with is the only source: a `tokenizer.model` beside it can
lack the tokens that were added later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.export.chat_template import for_llama_cpp

# How byte-level tokenizers cut text into words before merging; llama.cpp knows each cut by a name. With it, llama.cpp
# assumes whether whole words that are in the vocabulary skip the merges.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _SUFFIX +
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _SUFFIX +
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
# Tokens after which llama.cpp keeps white space in Phi-3.
_NEVER_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
# By pattern and whether whole words skip the merges.
_PRE_TOKENIZERS = {
    (_WORDS % "{1,3}", True): "llama-bpe",
    (_WORDS % "{1,3}", False): "dbrx",  # Phi-4
    (_WORDS % "", False): "qwen2",
    (_TEKKEN, True): "tekken",
    (_O200K, False): "gpt-4o",  # Phi-4-mini
}


def write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, prompt: Mapping[str, Any]
) -> None:
    """Writes vocabulary, merges, special tokens and chat template as the file's metadata.

    Args:
        writer: The writer of the GGUF file.
        tokenizer: A fast tokenizer.
        vocab_size: Rows of the model's embedding; those beyond the vocabulary become unused tokens.
        prompt: The prompt template of training, as in a stack's manifest; empty when unknown.

    Raises:
        UserError: No fast tokenizer, another kind of tokenizer, or more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no fast form (tokenizer.json)", fix="Save it with a fast tokenizer class.")
    if len(tokenizer) > vocab_size or max(tokenizer.get_vocab().values()) >= vocab_size:
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens, the model {vocab_size}",
            fix="Use the tokenizer of the base, without the tokens that were added to it.",
        )
    strips_after_special_tokens(tokenizer)
    parts = json.loads(backend.to_str())
    if parts["model"]["type"] != "BPE":
        raise UserError(
            f"llama.cpp cannot repeat this tokenizer: its model is {parts['model']['type']}",
            fix="BPE tokenizers can be exported: SentencePiece's as in LLaMA 2, byte-level ones as in LLaMA 3.",
        )
    sentencepiece = bool(parts["model"].get("byte_fallback"))
    adds_space = sentencepiece and _adds_space_prefix(parts, prompt)
    texts, types = _tokens(parts, vocab_size)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space)
        writer.add_token_scores(_scores(parts, texts))
    else:
        _write_byte_level(writer, parts)
    _write_special_tokens(writer, tokenizer, prompt)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(for_llama_cpp(tokenizer.chat_template))


def strips_after_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether white space after special tokens is dropped, as in Phi-3.

    Raises:
        UserError: Some tokens take white space beside them in a way that llama.cpp has not.
    """
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    odd = [text for text, token in added.items() if token.lstrip or token.single_word]
    stripping = {text for text, token in added.items() if token.rstrip} - {"</s>"}
    is_phi3 = stripping == added.keys() - {"</s>"} - _NEVER_STRIPPED and added.keys() >= _NEVER_STRIPPED
    if odd or (stripping and not is_phi3):
        shown = ", ".join(map(repr, (odd or sorted(stripping))[:3]))
        raise UserError(
            f"llama.cpp cannot repeat this tokenizer: white space beside {shown} is a part of the token",
            fix="Serve the merged model itself.",
        )
    return bool(stripping)


def adds_bos(tokenizer: PreTrainedTokenizerBase, prompt: Mapping[str, Any]) -> bool:
    """Whether llama.cpp has to put BOS before a prompt to repeat the prompts of training."""
    # Asked of the tokenizer itself: settings and post-processors that add it come in many forms.
    if tokenizer.bos_token_id is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        return False
    if prompt.get("template") != "chat":
        return True
    messages = [{"role": "user", "content": "a"}]  # what is rendered was encoded without further tokens
    return str(tokenizer.apply_chat_template(messages, tokenize=False)).startswith(tokenizer.bos_token)


def _adds_space_prefix(parts: dict[str, Any], prompt: Mapping[str, Any]) -> bool:
    """Whether text at the beginning and after a special token is encoded as if a space stood before it.

    llama.cpp does both or neither. Where transformers does it at the beginning only, a rendered chat, which begins
    with a special token and has more, needs neither; a plain text needs the first.
    """
    normalizers = _steps(parts["normalizer"], "normalizers")
    # Gemma cuts at spaces, of which its normalizer has left none.
    is_idle = {"type": "Split", "pattern": {"String": " "}}.items()
    pre_tokenizers = [step for step in _steps(parts["pre_tokenizer"], "pretokenizers") if not is_idle <= step.items()]
    known = all(step["type"] in ("Prepend", "Replace") for step in normalizers)
    known &= all(step["type"] == "Metaspace" for step in pre_tokenizers)
    if not known:
        raise _cannot_repeat(normalizers + pre_tokenizers)
    if any(step["type"] == "Prepend" for step in normalizers):
        return True
    schemes = {step["prepend_scheme"] for step in pre_tokenizers}
    return "always" in schemes or ("first" in schemes and prompt.get("template") != "chat")


def _scores(parts: dict[str, Any], texts: list[str]) -> list[float]:
    """SentencePiece merges the pair that gives the token of the best score: that of the earliest merge."""
    rank: dict[str, int] = {}
    for merge in parts["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        rank.setdefault(left + right, len(rank))
    return [-float(rank.get(text, len(rank))) for text in texts]


def _write_byte_level(writer: gguf.GGUFWriter, parts: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(parts))
    merges = parts["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    """llama.cpp's name for the word boundaries and for whether whole words skip the merges."""
    # Qwen normalises to NFC, which llama.cpp leaves out: the same for text that is NFC, as nearly all text is.
    normalizers = [step for step in _steps(parts["normalizer"], "normalizers") if step["type"] != "NFC"]
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    if normalizers or not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _cannot_repeat(normalizers + steps)
    *before, byte_level = steps
    ignores_merges, found = bool(parts["model"].get("ignore_merges")), None
    if byte_level["use_regex"]:
        if ignores_merges:
            pass
        elif not before:
            found = "gpt-2"
        elif [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"]:
            found = "smollm"
    elif [step["type"] for step in before] == ["Split"] and before[0]["behavior"] == "Isolated":
        found = _PRE_TOKENIZERS.get((before[0]["pattern"].get("Regex"), ignores_merges))
    if found:
        return found
    raise _cannot_repeat(steps, ignores_merges)


def _cannot_repeat(steps: list[dict[str, Any]], ignores_merges: bool = False) -> UserError:
    steps = [*steps, {"type": "ignore_merges=True"}] if ignores_merges else steps
    shown = "; ".join(f"{step['type']} {step.get('pattern', '')}".strip() for step in steps) or "none"
    return UserError(
        f"llama.cpp cannot repeat how this tokenizer cuts text: {shown}",
        fix="Those of LLaMA 1 to 3, Mistral, Qwen 2 and 3, Gemma 3, Phi-3 and 4, SmolLM and GPT-2 can be exported.",
    )


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _tokens(parts: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and kinds of all tokens, by id."""
    texts = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    sentencepiece = parts["model"].get("byte_fallback")
    for text, index in parts["model"]["vocab"].items():
        is_byte = sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        texts[index], types[index] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in parts["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if sentencepiece and added["content"] == parts["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        texts[added["id"]], types[added["id"]] = added["content"], kind
    return texts, types


def _write_special_tokens(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, prompt: Mapping[str, Any]
) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(adds_bos(tokenizer, prompt))
    encoded = tokenizer("a").input_ids
    writer.add_add_eos_token(len(encoded) > 1 and encoded[-1] == tokenizer.eos_token_id)
