"""A dialogue with a model, whose adapters can be switched between two questions. `tuna-peft chat` shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.messages import Message
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.models.generation.dense import dense_weights, has_room_for_dense
from tuna_peft.models.generation.generate import context_of, stream_responses
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.models.stack.files import AdapterStack


@dataclass(frozen=True)
class Reply:
    """A response; `stopped` says whether Ctrl-C ended it."""

    text: str
    stopped: bool


class Conversation:
    """The turns of a dialogue, and the stage that answers next.

    Only a chat template can render earlier turns; with any other template each question is answered by itself. Until
    `close`, the stage that answered last stays active, with its dense weights.

    Args:
        stack: A model with its adapters, or a single model.
        prompt: The prompt template.

    Attributes:
        stages: `base` and the adapters from bottom to top; only `model` for a single model.
        stage: The one that answers: with its adapter and those below.
        messages: All messages so far.
        remembers: Whether the template renders earlier turns.
        forgotten: Number of first messages that are left out because the model's context is full.
    """

    def __init__(self, stack: AdapterStack, prompt: PromptConfig):
        self.stack, self._template = stack, PromptTemplate(prompt)
        self.stages = ["base", *stack.names] if stack.names else ["model"]
        self.stage = self.stages[-1]
        self.remembers = prompt.template == "chat"
        self.messages: list[Message] = []
        self.forgotten = 0
        self._active, self._active_stage = contextlib.ExitStack(), ""

    def close(self) -> None:
        """Leaves the model as it was."""
        self._active.close()
        self._active_stage = ""

    def switch(self, stage: str) -> None:
        """Lets `stage` answer from now on; UserError if there is none of that name."""
        if stage not in self.stages:
            raise UserError(f"there is no stage {stage!r}", fix=did_you_mean(stage, self.stages))
        self.stage = stage

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages, self.forgotten = [], 0

    def ask(self, question: str, show: Callable[[str], object], **options: Any) -> Reply:
        """Answers a question and remembers both.

        Args:
            show: Is given the response in pieces, while it is generated.
            options: `temperature`, `top_p`, `max_new_tokens` and `seed` of `stream_responses`.

        Raises:
            UserError: The question fills the model's context.
        """
        reply = self._answer(self.stage, question, len(self.messages), show, options)
        if reply.text:
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.text}]
        return reply

    def compare(self, question: str | None, **options: Any) -> dict[str, Reply]:
        """The answers of all stages to a question, by default the last one, in the place where it was asked.

        Nothing of it is remembered. Ctrl-C ends it: the answers so far are returned.

        Raises:
            UserError: There is no question, or see `ask`.
        """
        turns = len(self.messages)
        if question is None:
            if not turns:
                raise UserError("no question was asked yet", fix="Give one: /compare QUESTION.")
            turns -= 2
            question = str(self.messages[turns]["content"])
        replies: dict[str, Reply] = {}
        for stage in self.stages:
            replies[stage] = self._answer(stage, question, turns, lambda piece: None, options)
            if replies[stage].stopped:
                break
        return replies

    def _answer(
        self, stage: str, question: str, turns: int, show: Callable[[str], object], options: dict[str, Any]
    ) -> Reply:
        ids = self._ids(question, turns, options["max_new_tokens"])
        pieces, model = Pieces(self.stack.tokenizer, show), self.stack.model
        try:
            self._activate(stage)
            [generated] = stream_responses(
                model, self.stack.tokenizer, [ids], dense=False, watch=pieces.add, **options
            )
        except KeyboardInterrupt:
            return Reply(pieces.shown, stopped=True)
        pieces.end(generated.texts[0])
        return Reply(generated.texts[0], stopped=False)

    def _activate(self, stage: str) -> None:
        """Making dense weights takes seconds, so they are kept for the next question."""
        if self._active_stage != stage:
            self.close()
            model = self.stack.model
            self._active.enter_context(active_adapters(model, self.stack.names[: self.stages.index(stage)]))
            if has_room_for_dense(model):
                self._active.enter_context(dense_weights(model))
            self._active_stage = stage

    def _ids(self, question: str, turns: int, max_new_tokens: int) -> list[int]:
        """Tokens of the question after the turns that fit, with room for a response."""
        tokenizer, context = self.stack.tokenizer, context_of(self.stack.model)
        if not self.remembers:
            return prompt_ids(self._template.render(question), tokenizer)
        while True:
            messages = [*self.messages[self.forgotten : turns], {"role": "user", "content": question}]
            ids = prompt_ids(messages, tokenizer)
            if self.forgotten >= turns or context is None:
                return ids
            if len(ids) + min(max_new_tokens, context // 2) <= context:
                return ids
            self.forgotten += 2


class Pieces:
    """Turns tokens into pieces of text as they come: no half characters, and no white space at the ends.

    Args:
        show: Is given each piece; joined, they are the response.

    Attributes:
        shown: The text so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object]):
        self.shown = ""
        self._tokenizer, self._show, self._ids = tokenizer, show, list[int]()

    def add(self, token: int) -> None:
        """The next token."""
        self._ids.append(token)
        # All tokens again: many tokenizers write a token differently at the beginning of a text.
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).strip()
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            self._extend(text)

    def end(self, text: str) -> None:
        """Shows what is left of the whole response."""
        self._extend(text)

    def _extend(self, text: str) -> None:
        if piece := text[len(self.shown) :]:
            self._show(piece)
            self.shown = text
