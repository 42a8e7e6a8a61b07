"""The texts that a chat template puts around messages, and the same as a template of Ollama.

Ollama fills Go templates, not Jinja. Instead of writing a second template by hand, a few conversations of marked
messages are rendered with the chat template, and the texts between the marks are read off.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_TURNS = 3
_SYSTEM_MARK = "Marked-system-message"
# Shown by Ollama when it is reached: Go stops at a template that is not defined.
_NO_SYSTEM = "this model was trained without system messages"


@dataclass(frozen=True)
class SystemTexts:
    """The texts around a system message, which belongs to the first or to the last user message.

    Attributes:
        before: From the beginning of the conversation to the system message.
        before_later: Where it goes with the last user message: from the answer before to the system message;
            None where it goes with the first.
        after: From the system message to the user message.
    """

    before: str
    before_later: str | None
    after: str


@dataclass(frozen=True)
class ChatLayout:
    """The texts around the messages of a conversation in which user and assistant alternate.

    Attributes:
        first: Before the first user message, without a system message.
        answer: From a user message to the answer that is in the conversation already.
        following: From an answer to the next user message; it begins with the end-of-turn token.
        generation: After the last user message, where the model continues.
        system: Around a system message; None where the template refuses one.
    """

    first: str
    answer: str
    following: str
    generation: str
    system: SystemTexts | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str) -> ChatLayout | None:
        """Reads the layout off a chat template.

        Returns:
            None where the template cannot be described in this way: it depends on the date or on the place of a turn.
        """
        if "strftime_now" in template:
            return None
        plain = _conversations(tokenizer, template, system=False)
        if len(plain) < _TURNS:
            return None
        first, generation = plain[0][0], plain[0][-1]
        answer, following = plain[1][2], plain[1][4]
        found = cls(first, answer, following, generation)
        if plain != [found._expected(users, system=False) for users in range(1, _TURNS + 1)]:
            return None
        with_system = _conversations(tokenizer, template, system=True)
        if not with_system:
            return found
        if len(with_system) < _TURNS:
            return None
        before, after = with_system[0][0], with_system[0][2]
        is_with_last = with_system[1][1] != _SYSTEM_MARK
        found = cls(
            first, answer, following, generation,
            SystemTexts(before, with_system[1][4] if is_with_last else None, after),
        )  # fmt: skip
        if with_system != [found._expected(users, system=True) for users in range(1, _TURNS + 1)]:
            return None
        return found

    def without_bos(self, bos: str) -> ChatLayout:
        """The same for a tokenizer that puts BOS before a text by itself."""
        system = self.system and SystemTexts(
            self.system.before.removeprefix(bos), self.system.before_later, self.system.after
        )
        return ChatLayout(self.first.removeprefix(bos), self.answer, self.following, self.generation, system)

    def to_ollama(self) -> str:
        """The layout as a Go template over `.Messages`.

        All texts are quoted, so that neither Go's trimming nor the Modelfile's triple quotes find anything in them.
        """
        before_first, before_later = _text(self.first), _text(self.following)
        lines = []
        if self.system is None:
            lines.append(f"{{{{- if .System }}}}{{{{ template {_quoted(_NO_SYSTEM)} . }}}}{{{{ end }}}}")
        else:
            is_here = "$.System" if self.system.before_later is None else "and $.System $last"
            with_system = f"{_text(self.system.before)}{{{{ $.System }}}}{_text(self.system.after)}"
            before_first = f"{{{{ if {is_here} }}}}{with_system}{{{{ else }}}}{before_first}{{{{ end }}}}"
            if self.system.before_later is not None:
                with_system = f"{_text(self.system.before_later)}{{{{ $.System }}}}{_text(self.system.after)}"
                before_later = f"{{{{ if {is_here} }}}}{with_system}{{{{ else }}}}{before_later}{{{{ end }}}}"
        lines += [
            "{{- $first := true }}",
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq .Role "user" }}',
            "{{- if $first }}{{ $first = false }}",
            f"{{{{- {before_first[3:]}" if before_first else "",
            "{{- else }}",
            f"{{{{- {before_later[3:]}" if before_later else "",
            "{{- end }}{{ .Content }}",
            f"{{{{- if $last }}}}{_text(self.generation)}{{{{ else }}}}{_text(self.answer)}{{{{ end }}}}",
            '{{- else if eq .Role "assistant" }}{{ .Content }}',
            "{{- end }}",
            "{{- end }}",
        ]
        return "\n".join(line for line in lines if line)

    def _expected(self, users: int, *, system: bool) -> list[str]:
        """What `_pieces` gives if the layout is right."""
        pieces = []
        for index in range(users):
            is_last = index == users - 1
            before = self.following if index else self.first
            if system and self.system is not None:
                with_last = self.system.before_later
                if is_last if with_last is not None else index == 0:
                    before_system = with_last if index and with_last is not None else self.system.before
                    pieces += [before_system, _SYSTEM_MARK]
                    before = self.system.after
            pieces += [before, _mark("user", index)]
            if not is_last:
                pieces += [self.answer, _mark("assistant", index)]
        return [*pieces, self.generation]


def _conversations(tokenizer: PreTrainedTokenizerBase, template: str, *, system: bool) -> list[list[str]]:
    """Conversations of one user message and of more, as `_pieces`, without those that the template refuses."""
    found = (_pieces(tokenizer, template, users, system=system) for users in range(1, _TURNS + 1))
    return [pieces for pieces in found if pieces is not None]


def _pieces(tokenizer: PreTrainedTokenizerBase, template: str, users: int, *, system: bool) -> list[str] | None:
    """A conversation rendered, cut before and after each message; None where the template refuses it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": _SYSTEM_MARK}] if system else []
    for index in range(users):
        messages += [{"role": role, "content": _mark(role, index)} for role in ("user", "assistant")]
    try:
        text = tokenizer.apply_chat_template(
            messages[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        return None
    marks = [message["content"] for message in messages[:-1]]
    pieces = re.split(f"({'|'.join(marks)})", str(text))
    return pieces if sorted(pieces[1::2]) == sorted(marks) else None


def _mark(role: str, index: int) -> str:
    return f"Marked-{role}-message-{index}-"


def _text(text: str) -> str:
    """An action that writes a text."""
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A string in Go's syntax, which JSON's is a part of."""
    return json.dumps(text, ensure_ascii=False)
