"""The Ollama `Modelfile` beside a GGUF file, with the chat template of training in Ollama's template language.

https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.export.chat_template import chat_template_of, for_llama_cpp
from tuna_peft.export.gguf.chat_layout import ChatLayout
from tuna_peft.export.gguf.tokenizer import adds_bos
from tuna_peft.files import write_text

MODELFILE = "Modelfile"

logger = logging.getLogger("tuna_peft")


def write_modelfile(
    path: Path, file: str, tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any], adapter: str | None = None
) -> None:
    """Writes the Modelfile.

    Args:
        path: Where to.
        file: The model's GGUF file, relative to it.
        tokenizer: The model's tokenizer.
        prompt: The prompt template of training, as in a stack's manifest; empty when unknown: then the tokenizer's
            chat template is taken.
        adapter: The GGUF adapter's file on top of the model, relative to it.
    """
    lines = [f"FROM ./{file}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    layout = chat_layout(tokenizer, prompt)
    if layout is not None:
        lines.append(f'TEMPLATE """{layout.to_ollama()}"""')
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in _stops(tokenizer, layout)]
    write_text(path, "\n".join(lines) + "\n")


def chat_layout(tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any]) -> ChatLayout | None:
    """The prompt of training as Ollama has to render it, with BOS left out where llama.cpp adds it.

    Returns:
        None where there is no template, or none that Ollama could fill: then the chat template in the GGUF file
        decides (Ollama takes it by itself, older versions only if they recognize it).
    """
    if prompt.get("template") == "none":
        return ChatLayout("", "", tokenizer.eos_token or "", "")
    template = chat_template_of(prompt, tokenizer) or tokenizer.chat_template
    if not isinstance(template, str):
        return None
    layout = ChatLayout.of(tokenizer, for_llama_cpp(template))
    if layout is None:
        logger.warning("Modelfile: no TEMPLATE, because Ollama's language cannot repeat this chat template")
        return None
    return layout.without_bos(tokenizer.bos_token) if adds_bos(tokenizer, prompt) else layout


def _stops(tokenizer: PreTrainedTokenizerBase, layout: ChatLayout | None) -> list[str]:
    """EOS, and the token that ends an answer in a conversation."""
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if layout is not None:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        ends = [token for token in special if layout.following.lstrip().startswith(token)]
        stops += sorted(ends, key=len)[-1:]
    return list(dict.fromkeys(stops))
