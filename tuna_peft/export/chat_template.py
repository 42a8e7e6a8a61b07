"""Converts the training prompt to a chat template, so that servers prompt the model as in training.

`base_files`, `gguf` and the Modelfile use it.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate

_BOS, _BOS_AND_SPACE = "{{- bos_token -}}\n", "{{- bos_token + ' ' -}}\n"
_SPACE_AFTER_EOS = "{{- '' if loop.first else ' ' -}}\n"
_REFUSAL = "this model knows user and assistant messages only, as in its training prompt"


def chat_template_of(prompt: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A Jinja template that renders one user message as the training prompt, and further turns one after another.

    A message is an instruction. It may also contain an input, after the text that separates the two in the training
    prompt (for Alpaca `\\n\\n### Input:\\n`); then the prompt for instructions with an input is used.

    Args:
        prompt: The manifest's prompt template.
        tokenizer: The base's tokenizer; BOS is written if it puts one before a text.

    Returns:
        None if training used the tokenizer's own chat template, or no template.
    """
    if not prompt or prompt["template"] in ("chat", "none"):
        return None
    template = PromptTemplate(PromptConfig.model_validate(prompt))
    turn = "{{- " + _expression(template.no_input, "message['content']") + " -}}"
    between = _between(template.with_input)
    if between is not None:
        with_input = _expression(template.with_input, "parts[0]", "parts[1]")
        turn = (
            f"{{%- set separator = {_literal(between)} -%}}\n"
            "{%- if separator in message['content'] -%}\n"
            "{%- set parts = message['content'].split(separator, 1) -%}\n"
            f"{{{{- {with_input} -}}}}\n"
            "{%- else -%}\n"
            f"{turn}\n"
            "{%- endif -%}"
        )
    beginning = _beginning(template.no_input.replace("{instruction}", "a"), tokenizer)
    # A later prompt gets the first token that it had in training, as the first one does.
    space = _SPACE_AFTER_EOS if beginning == _BOS_AND_SPACE else ""
    return (
        f"{beginning}{{%- for message in messages -%}}\n"
        "{%- if message['role'] == 'user' -%}\n"
        f"{space}{turn}\n"
        "{%- elif message['role'] == 'assistant' -%}\n"
        "{{- message['content'] + eos_token -}}\n"
        "{%- else -%}\n"
        f"{{{{- raise_exception({_literal(_REFUSAL)}) -}}}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
    )


def for_llama_cpp(template: str) -> str:
    """The template for llama.cpp, which adds LLaMA's space after BOS and EOS itself."""
    if not template.startswith(_BOS_AND_SPACE):
        return template
    return template.replace(_BOS_AND_SPACE, _BOS, 1).replace(_SPACE_AFTER_EOS, "", 1)


def _beginning(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before the first message, so that the tokens equal those of `text` with BOS in training."""
    ids = tokenizer(text).input_ids
    if ids[:1] != [tokenizer.bos_token_id]:
        return ""
    # LLaMA's SentencePiece begins a text with a space of its own, but not after a BOS that is written out.
    spaced = tokenizer(f"{tokenizer.bos_token} {text}", add_special_tokens=False).input_ids
    return _BOS_AND_SPACE if spaced == ids else _BOS


def _between(template: str) -> str | None:
    """The text between instruction and input; None if it cannot separate them."""
    parts = re.split(r"(\{instruction\}|\{input\})", template)
    return parts[2] if parts[1::2] == ["{instruction}", "{input}"] and parts[2].strip() else None


def _expression(template: str, instruction: str, input: str = "''") -> str:
    """A Jinja expression for a template text with the placeholders filled by expressions."""
    values = {"{instruction}": instruction, "{input}": input}
    parts = re.split(r"(\{instruction\}|\{input\})", template)
    return " + ".join(values.get(part) or _literal(part) for part in parts if part)


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
