"""Renders a prompt with its responses as training sees them, and checks what the chat template did to their texts.

A chat template is a program: it may strip, drop or add text. For every response it is checked that training starts
from the text that generation starts from, and that what follows is the response and the same end of turn for all. A
check compares strings that were rendered anyway, so it costs little beside the rendering. Used by `tokenize`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import Rendering
from tuna_peft.data.messages import Message
from tuna_peft.data.ranked import Record, Response
from tuna_peft.data.texts import prompt_text, render_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where reasoning ends: <think> is DeepSeek-R1's, Qwen's and most others'; [THINK] is Magistral's.
_END_OF_REASONING = re.compile(r"(?:</think>|\[/THINK\])\s*")
# Qwen3's template writes it before a response without reasoning, as the model does.
_EMPTY_REASONING = re.compile(r"^\s*<think>\s*</think>\s*")
_CLOSED_REASONING = re.compile(r"^\s*</think>\s*")  # the same where the generation prompt opens it
_OPEN_REASONING = re.compile(r"<think>\s*$")
_PLACE = "(the response)"

STARTS_ELSEWHERE = "prompt differs from generation"
CHANGED = "response changed by the chat template"
ADDED = "text added by the chat template"
PROMPT_CHANGED = "prompt changed by the chat template"
SPECIAL = "special token in a response"
WHITESPACE = "white space changed by the chat template"  # counted, never an error

_FIXES = {
    STARTS_ELSEWHERE: "Set `rendering: verbatim` under `prompt` in the recipe: each response then follows the "
    "generation prompt, unchanged. `rendering: lenient` trains on what the template writes.",
    SPECIAL: "Remove it from the text or skip such records (`on_bad_row: skip`); `rendering: lenient` under `prompt` "
    "in the recipe trains on it as a control token.",
    ADDED: "Give the template a generation prompt that ends where the response begins. If the model is to write this "
    "text itself (a channel of gpt-oss), set `rendering: lenient` under `prompt` in the recipe.",
    PROMPT_CHANGED: "Use a model whose template supports it, remove it from the data, or set `rendering: lenient` "
    "under `prompt` in the recipe to train without it.",
}  # fmt: skip

# `verbatim` cannot help where several turns follow each other: what stands between them is the template's.
_TURNS_FIX = (
    "Give each turn as a response of its own (the turns before it belong to the prompt); `rendering: lenient` under "
    "`prompt` in the recipe trains on the texts of the turns as the template writes them."
)


_TURN_FIX = "Use a model whose template supports it, or skip such records (in a recipe: `on_bad_row: skip`)."


@dataclass
class Joint:
    """A prompt with one response as text.

    Attributes:
        text: The whole text.
        loss: Begin and end of each part that carries loss, as positions in the text.
    """

    text: str
    loss: list[tuple[int, int]]


class Renderer:
    """Renders records for training; for the arguments see `tuna_peft.data.config.PromptConfig`.

    Attributes:
        changes: For each kind of change that was accepted, the number of responses and the first of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, reasoning_loss: bool):
        self.tokenizer, self.rendering, self.reasoning_loss = tokenizer, rendering, reasoning_loss
        self.changes: dict[str, tuple[int, str]] = {}
        special = [str(token) for token in tokenizer.all_special_tokens]
        special += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted(set(special), key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._eos = str(tokenizer.eos_token)
        self._end: str | None = None  # the end of a turn, as the template writes it

    def render(self, record: Record, where: str, names: list[str]) -> tuple[str, list[Joint]]:
        """The text of the prompt, and of the prompt with each response and then the reference.

        Args:
            record: Of the ranked type.
            where: The record's place, for errors.
            names: The place of each response.

        Raises:
            BadRow: The template refuses the messages, or it changes a text and `rendering` does not accept that.
        """
        prompt, tools = record["prompt"], record.get("tools")
        responses = [*record["completions"], *([] if record["reference"] is None else [record["reference"]])]
        start = prompt_text(prompt, self.tokenizer, where, tools)
        if isinstance(prompt, str):
            joints = [_plain(start + response, start) for response in responses]
        else:
            self._check_prompt(prompt, tools, start, where)
            joints = [
                self._joint(prompt, response, start, tools, name)
                for response, name in zip(responses, names, strict=True)
            ]
        for response, joint, name in zip(responses, joints, names, strict=True):
            said = response if isinstance(response, str) else " ".join(message["content"] for message in response)
            # EOS at the very end of a plain text is what training adds anyway.
            if found := self._special.search(said.removesuffix(self._eos) if isinstance(prompt, str) else said):
                self._report(SPECIAL, f"the response contains {found.group()!r}, which becomes a control token", name)
            if not self.reasoning_loss:
                joint.loss = [
                    (match.end() if (match := _END_OF_REASONING.search(joint.text, begin, end)) else begin, end)
                    for begin, end in joint.loss
                ]
        return start, joints

    def _joint(self, prompt: list[Message], response: Response, start: str, tools: Any, name: str) -> Joint:
        if not isinstance(response, str):
            return self._turns(prompt, response, start, tools, name)
        if self.rendering == "verbatim":
            return _plain(start + _after_opening(start, response) + self._end_of_turn(prompt, tools, name), start)
        answered = [*prompt, {"role": "assistant", "content": response}]
        text = self._trimmed(render_messages(answered, self.tokenizer, name, tools, generate=False))
        self._check_text(text, start, response, name)
        return _plain(text, start)

    def _turns(self, prompt: list[Message], turns: list[Message], start: str, tools: Any, name: str) -> Joint:
        """Tool calls and several turns, by the template: loss on the turns of the assistant alone."""
        whole = [*prompt, *turns]
        text = self._trimmed(render_messages(whole, self.tokenizer, name, tools, generate=False))
        loss: list[tuple[int, int]] = []
        for index, turn in enumerate(turns, len(prompt)):
            if turn["role"] != "assistant":
                continue
            before = prompt_text(whole[:index], self.tokenizer, name, tools)
            after = self._trimmed(render_messages(whole[: index + 1], self.tokenizer, name, tools, generate=False))
            if not text.startswith(after):  # Phi-3's template ends the last turn with EOS
                after = after.removesuffix(self._eos)
            begin, end = len(before), len(after)
            if text.startswith(before) and text.startswith(after):
                self._check_turn(turn, after[begin:], name)
            else:
                if not text.startswith(before):
                    self._report_start(text, before, name, _TURNS_FIX)
                else:
                    self._report(CHANGED, "the chat template changes a turn when others follow it", name, _TURNS_FIX)
                begin, end = self._find_turn(text, turn, loss[-1][1] if loss else 0, name)
            loss.append((begin, end))
        return Joint(text, loss)

    def _find_turn(self, text: str, turn: Message, cursor: int, name: str) -> tuple[int, int]:
        """Where a turn that the template writes otherwise is in the whole text, without the end of the turn."""
        said = turn["content"].strip()
        begin = text.find(said, cursor) if said else -1
        if begin < 0:
            what = f"the chat template drops or changes a turn of the response: {said[:80]!r}"
            raise BadRow(what, reason=CHANGED, where=name, fix=_TURNS_FIX)
        return begin, begin + len(said)

    def _check_text(self, text: str, start: str, response: str, name: str) -> None:
        if not text.startswith(start):
            self._report_start(text, start, name)
            return
        rest, response = text[len(start) :], _after_opening(start, response)
        if not rest.startswith(response):
            said = response.strip()
            rest = rest.lstrip()
            if not rest.startswith(said):
                rest = (_CLOSED_REASONING if _OPEN_REASONING.search(start) else _EMPTY_REASONING).sub(
                    "", rest, count=1
                )
            if not rest.startswith(said):
                if _squeezed(rest).startswith(_squeezed(said)):
                    self._count(WHITESPACE, f"{name}: {response[:60]!r}")
                elif said in rest:
                    added = rest[: rest.index(said)]
                    what = f"the chat template writes {added[:60]!r} between its generation prompt and the response"
                    self._report(ADDED, f"{what}, where it would carry loss", name)
                else:
                    what = f"the chat template changes the response: {response[:80]!r} becomes {rest[:80]!r}"
                    self._report(CHANGED, what, name)
                return
            if said != response:
                self._count(WHITESPACE, f"{name}: {response[:60]!r}")
            response = said
        end = rest[len(response) :].strip()
        if self._end is None:
            self._end = end
        elif end != self._end:
            what = f"the chat template writes {end[:60]!r} after this response and {self._end[:60]!r} after others"
            self._report(ADDED, what, name)

    def _check_turn(self, turn: Message, said: str, name: str) -> None:
        squeezed = _squeezed(said)
        parts = [turn["content"], turn.get("reasoning_content"), turn.get("thinking"), *_call_names(turn)]
        for part in filter(None, parts):
            if _squeezed(part) not in squeezed:
                what = f"the chat template drops a part of the response: {part[:80]!r}"
                if part in _call_names(turn):
                    what = f"the chat template drops `tool_calls` of the response ({part})"
                self._report(CHANGED, what, name, _TURN_FIX)
                return

    def _check_prompt(self, prompt: list[Message], tools: Any, start: str, where: str) -> None:
        for index, message in enumerate(prompt):
            content = message["content"]
            if message["role"] == "assistant":  # templates drop the reasoning of earlier turns, in generation too
                content = _END_OF_REASONING.split(content)[-1]
            # The results of tools are often rendered as JSON; everything else is expected as it is.
            if (
                message["role"] != "tool"
                and content.strip() not in start
                and _squeezed(content) not in _squeezed(start)
            ):
                what = f"the chat template drops or changes message {index} of the prompt: {content[:80]!r}"
                self._report(PROMPT_CHANGED, what, where)
            for called in _call_names(message):
                if called not in start:
                    what = f"the chat template drops `tool_calls` of message {index} of the prompt ({called})"
                    self._report(PROMPT_CHANGED, what, where)
        for tool in tools or []:
            described = tool.get("function", tool).get("name")
            if described and described not in start:
                self._report(PROMPT_CHANGED, f"the chat template drops `tools` ({described})", where)

    def _report_start(self, text: str, start: str, name: str, fix: str | None = None) -> None:
        same = next(
            (i for i, (a, b) in enumerate(zip(text, start, strict=False)) if a != b), min(len(text), len(start))
        )
        around = max(0, same - 20)
        self._report(
            STARTS_ELSEWHERE,
            f"generation starts from {start[around : same + 40]!r} and training from {text[around : same + 40]!r}",
            name,
            fix,
        )

    def _report(self, reason: str, what: str, name: str, fix: str | None = None) -> None:
        if self.rendering == "lenient":
            self._count(reason, f"{name}: {what}")
            return
        raise BadRow(what, reason=reason, where=name, fix=fix or _FIXES.get(reason, _FIXES[STARTS_ELSEWHERE]))

    def _count(self, reason: str, example: str) -> None:
        count, first = self.changes.get(reason, (0, example))
        self.changes[reason] = count + 1, first

    def _trimmed(self, text: str) -> str:
        # Templates add a newline after EOS, before the next turn; here there is no next turn.
        trimmed = text.rstrip()
        return trimmed if trimmed.endswith(self._eos) else text

    def _end_of_turn(self, prompt: list[Message], tools: Any, name: str) -> str:
        if self._end is None:
            answered = [*prompt, {"role": "assistant", "content": _PLACE}]
            text = self._trimmed(render_messages(answered, self.tokenizer, name, tools, generate=False))
            if _PLACE not in text:
                raise BadRow("the chat template drops the response", reason=CHANGED, where=name)
            self._end = text[text.rindex(_PLACE) + len(_PLACE) :]
        return self._end


def _plain(text: str, start: str) -> Joint:
    return Joint(text, [(len(start), len(text))])


def _after_opening(start: str, response: str) -> str:
    """The response behind a generation prompt that may have opened its reasoning already, as DeepSeek-R1's does."""
    if _OPEN_REASONING.search(start) and response.lstrip().startswith("<think>"):
        return response.lstrip().removeprefix("<think>").lstrip("\n")
    return response


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _call_names(message: Message) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls", [])]
