"""Renders a prompt and its responses as text, and tokenizes it. Training and generation both use this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuna_peft.data.ranked import Prompt
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, where: str | None = None) -> str:
    """The prompt as text; messages are rendered with the tokenizer's chat template and its generation prompt.

    Raises:
        UserError: There is no chat template, or it refuses the messages.
    """
    return prompt if isinstance(prompt, str) else _render(prompt, tokenizer, where, add_generation_prompt=True)


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt, where generation starts: with BOS if the tokenizer adds it, without EOS."""
    return TextTokenizer(tokenizer)([prompt_text(prompt, tokenizer)], special=isinstance(prompt, str))[0]


def joint_texts(prompt: Prompt, responses: list[str], tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """The text of the prompt, then the text of the prompt with each response."""
    if isinstance(prompt, str):
        return [prompt, *(prompt + response for response in responses)]
    texts = [prompt_text(prompt, tokenizer, where)]
    for response in responses:
        answered = [*prompt, {"role": "assistant", "content": response}]
        text = _render(answered, tokenizer, where, add_generation_prompt=False)
        # Templates add a newline after EOS, before the next turn; here there is no next turn.
        texts.append(text.rstrip() if text.rstrip().endswith(str(tokenizer.eos_token)) else text)
    return texts


class TextTokenizer:
    """Tokenizes whole texts: BOS if the tokenizer adds it, but never twice, and nothing added at the end.

    Args:
        tokenizer: A transformers tokenizer with an EOS token.

    Raises:
        UserError: It has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so the model could not learn where a response ends",
                where=tokenizer.name_or_path or None,
                fix="Set `tokenizer.eos_token`.",
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        # Some tokenizers add EOS or [SEP] after every text: the number of tokens to remove.
        bare, full = (self._call(["a"], special)[0] for special in (False, True))
        spare = len(full) - len(bare)
        self._suffix = next((n for n in range(spare + 1) if full[spare - n : len(full) - n] == bare), 0)

    def __call__(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; `special=False` for chat templates, which contain BOS themselves."""
        rows = self._call(texts, special)
        if not special:
            return rows
        bos = self.tokenizer.bos_token_id
        rows = [ids[: len(ids) - self._suffix] for ids in rows]
        # A prompt that was rendered by another tool may begin with BOS as text.
        return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in rows]

    def _call(self, texts: list[str], special: bool) -> list[list[int]]:
        # verbose=False: no warning about the tokenizer's own maximum, because the caller checks the length.
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str | None, *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the prompt is a list of messages, and the tokenizer has no chat template",
            where=where,
            fix="Use `template: alpaca` or a template text, or give the tokenizer a chat template.",
        )
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the tokenizer's chat template refuses these messages ({roles}): {error}",
            where=where,
            fix="Change the messages to roles that the model supports, or use another template.",
        ) from error
    return str(text)
