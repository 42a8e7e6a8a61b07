"""From a prompt and its responses to whole texts, and from those to tokens: what training and generation share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuna_peft.data.ranked import Prompt
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, where: str | None = None) -> str:
    """The prompt as text; messages go through the tokenizer's chat template, up to where the answer begins.

    Raises:
        UserError: There is no chat template, or it refuses the messages.
    """
    return prompt if isinstance(prompt, str) else _render(prompt, tokenizer, where, add_generation_prompt=True)


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt alone, as generation starts from: BOS as the tokenizer adds it, never EOS."""
    return TextTokenizer(tokenizer)([prompt_text(prompt, tokenizer)], special=isinstance(prompt, str))[0]


def joint_texts(prompt: Prompt, responses: list[str], tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """The text of the prompt alone, then of the prompt with each response."""
    if isinstance(prompt, str):
        return [prompt, *(prompt + response for response in responses)]
    texts = [prompt_text(prompt, tokenizer, where)]
    for response in responses:
        answered = [*prompt, {"role": "assistant", "content": response}]
        text = _render(answered, tokenizer, where, add_generation_prompt=False)
        # Templates put a newline behind EOS, for the turn that would follow; here nothing follows.
        texts.append(text.rstrip() if text.rstrip().endswith(str(tokenizer.eos_token)) else text)
    return texts


class TextTokenizer:
    """Tokenises whole texts: BOS as the tokenizer adds it but never twice, and nothing added at the end.

    Args:
        tokenizer: A transformers tokenizer with an EOS token.

    Raises:
        UserError: It has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so a response would have no end",
                where=tokenizer.name_or_path or None,
                fix="Set `tokenizer.eos_token`.",
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        # Some tokenizers put EOS or [SEP] behind every text: how many tokens to take off again.
        bare, full = (self._call(["a"], special)[0] for special in (False, True))
        spare = len(full) - len(bare)
        self._suffix = next((n for n in range(spare + 1) if full[spare - n : len(full) - n] == bare), 0)

    def __call__(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; `special=False` for chat templates, which write BOS themselves."""
        rows = self._call(texts, special)
        if not special:
            return rows
        bos = self.tokenizer.bos_token_id
        rows = [ids[: len(ids) - self._suffix] for ids in rows]
        # A prompt that was rendered elsewhere may begin with BOS as text.
        return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in rows]

    def _call(self, texts: list[str], special: bool) -> list[list[int]]:
        # verbose=False: no warning about the tokenizer's own maximum; the caller checks the length.
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]


def _render(
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    where: str | None,
    *,
    add_generation_prompt: bool,
) -> str:
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
            fix="Change the messages to what the model was made for, or use another template.",
        ) from error
    return str(text)
