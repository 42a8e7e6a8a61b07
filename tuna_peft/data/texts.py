"""Renders a prompt as text and tokenizes it. Training and generation both use this."""

from __future__ import annotations

import copy
import datetime
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.messages import Message
from tuna_peft.data.ranked import Prompt
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STARTED = datetime.date.today()  # the same date for all that one process renders, also past midnight


def prompt_text(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, where: str | None = None, tools: list[Any] | None = None
) -> str:
    """The prompt as text; messages are rendered with the tokenizer's chat template and its generation prompt.

    Raises:
        BadRow: The template refuses the messages.
        UserError: There is no chat template.
    """
    return prompt if isinstance(prompt, str) else render_messages(prompt, tokenizer, where, tools, generate=True)


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> list[int]:
    """The tokens of a prompt, where generation starts: with BOS if the tokenizer adds it, without EOS.

    Raises:
        BadRow: Half a surrogate pair, as a terminal gives for bytes that are not UTF-8; or see `prompt_text`.
    """
    text = prompt_text(prompt, tokenizer, tools=tools)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"the prompt is not Unicode text: character {error.start} is {text[error.start]!r}"
        fix = "Give it in UTF-8, and let the terminal use UTF-8 (`locale` shows its encoding)."
        raise BadRow(what, reason="broken character", fix=fix) from None
    return TextTokenizer(tokenizer)([text], special=isinstance(prompt, str))[0]


def reads_the_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template's output changes with the date."""
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("strftime_now" in text for text in texts)


def set_template_date(tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
    """Fixes the date (YYYY-MM-DD) that the chat template sees as now; None: the day on which this process began."""
    tokenizer.template_date = datetime.date.fromisoformat(date) if date else None


def template_date(tokenizer: PreTrainedTokenizerBase) -> datetime.date:
    """The date that the chat template sees as now."""
    return getattr(tokenizer, "template_date", None) or _STARTED


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
        if not texts:
            return []
        # verbose=False: no warning about the tokenizer's own maximum, because the caller checks the length.
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]


def render_messages(
    messages: Sequence[Message], tokenizer: Any, where: str | None, tools: list[Any] | None = None, *, generate: bool
) -> str:
    """Messages as text by the tokenizer's chat template, with its generation prompt if `generate`.

    Raises:
        BadRow: The template refuses the messages or fails on them.
        UserError: There is no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the prompt is a list of messages, and the tokenizer has no chat template",
            where=where,
            fix="Use `template: alpaca` or a template text, or give the tokenizer a chat template.",
        )
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generate}
    if tools:
        options["tools"] = tools
    if reads_the_clock(tokenizer):
        template = tokenizer.get_chat_template(tools=tools)
        options["chat_template"] = _clock(template_date(tokenizer)) + template
    try:
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except TypeError:  # templates of the DeepSeek-R1 kind join the arguments of a call as text
            return str(tokenizer.apply_chat_template(_with_json_arguments(messages), **options))
    except Exception as error:  # a template is a program: it may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow(
            f"the tokenizer's chat template refuses these messages ({roles}): {error}",
            reason="refused by the chat template",
            where=where,
            fix="Change the messages to roles that the model supports, use another template, or skip such records "
            "(in a recipe: `on_bad_row: skip`).",
        ) from error


@functools.lru_cache
def _clock(date: datetime.date) -> str:
    """A macro in the place of transformers' `strftime_now`, which reads the clock and cannot be passed in."""
    codes = {f"%{code}": date.strftime(f"%{code}") for code in "aAbBcdHIjmMpSUwWxXyYfGuVeFT"}
    codes |= {"%-d": str(date.day), "%-m": str(date.month)}
    replaced = " | ".join(["format", *(f"replace({code!r}, {value!r})" for code, value in codes.items())])
    # The empty text keeps a newline at the beginning of the template, which would be trimmed after a block.
    return f"{{%- macro strftime_now(format) -%}}{{{{ {replaced} }}}}{{%- endmacro %}}{{{{ '' }}}}"


def _with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    changed = copy.deepcopy(list(messages))
    for message in changed:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return changed
