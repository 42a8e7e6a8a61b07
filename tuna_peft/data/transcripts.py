"""Reads dialogues in plain text, "Human: ... Assistant: ...", as in Anthropic's hh-rlhf. Used by `readers`."""

from __future__ import annotations

import os
import re
from typing import Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import Markers
from tuna_peft.data.messages import Message
from tuna_peft.data.ranked import Record


def looks_like_transcripts(raw: Record) -> bool:
    """Whether `chosen` and `rejected` are texts with the default markers, and there is no prompt."""
    texts = [raw.get("chosen"), raw.get("rejected")]
    return "prompt" not in raw and all(isinstance(text, str) and _split(text, Markers()) for text in texts)


def read_transcripts(raw: Record, markers: Markers, as_messages: bool, where: str) -> tuple[Any, list[Any]]:
    """The prompt and the two responses of a pair of transcripts, the chosen one first.

    Args:
        raw: Has `chosen` and `rejected`.
        markers: What stands before a turn of the user and of the assistant.
        as_messages: Return dialogues as messages, and None as the prompt, which is their common beginning. Otherwise
            the prompt is the text that both have in common, up to a marker of the assistant, and the responses are the
            texts after it.

    Raises:
        BadRow: There is no transcript, or the two have no turn in common.
    """
    texts = [str(raw.get("chosen")), str(raw.get("rejected"))]
    dialogues = [_split(text, markers) for text in texts]
    for name, dialogue in zip(("chosen", "rejected"), dialogues, strict=True):
        if not dialogue or dialogue[-1]["role"] != "assistant":
            what = f"`{name}` is no transcript that ends with a turn of the assistant ({markers.assistant!r})"
            raise BadRow(what, reason="no transcript", where=where, fix="Set `markers` for this data in the recipe.")
    if as_messages:
        return None, dialogues
    common = os.path.commonprefix(texts)
    ends = [match.end() for match in _pattern(markers).finditer(common) if match.lastgroup == "assistant"]
    # A response may begin with a marker ("Assistant: Human: ..."), which is a turn only at the start of a line.
    if not ends or any(_pattern(markers).search(text, ends[-1]) for text in texts):
        raise BadRow(
            "the two transcripts differ before their last response",
            reason="no common prompt",
            where=where,
            fix="Skip such records (in a recipe: `on_bad_row: skip`), or read all of them as messages: "
            "`prompt: {template: chat}` ranks several turns as a whole.",
        )
    return common[: ends[-1]], [text[ends[-1] :] for text in texts]


def _pattern(markers: Markers) -> re.Pattern[str]:
    user, assistant = re.escape(markers.user), re.escape(markers.assistant)
    return re.compile(rf"(?:^|\n)\s*(?:(?P<user>{user})|(?P<assistant>{assistant}))")


def _split(text: str, markers: Markers) -> list[Message]:
    found = list(_pattern(markers).finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)] * bool(found)
    return [
        {"role": str(match.lastgroup), "content": text[match.end() : end].strip()}
        for match, end in zip(found, ends, strict=True)
    ]
