"""A model under evaluation, and its greedy answers, each of which is generated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.ranked import Prompt
from tuna_peft.data.texts import prompt_ids
from tuna_peft.evaluation.results import Exclusion
from tuna_peft.journal import Journal, content_key
from tuna_peft.models.generation.generate import context_of, stream_responses

JOURNAL = "evaluation/journal.jsonl"
"""Where a run keeps what its stages answered."""


@dataclass
class Question:
    """A prompt of a task.

    Attributes:
        id: Its name, unique within the task.
        text: As the benchmark has it.
        prompt: As the model is given it: `text` in the prompt template.
        references: What counts as right, where the benchmark says so.
        group: The benchmark's task that it belongs to.
        record: Whatever else the scorer needs.
        ids: `prompt` in tokens, once it has been asked: all stages have one tokenizer.
    """

    id: str
    text: str
    prompt: Prompt
    references: list[str] = field(default_factory=list)
    group: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    ids: list[int] | None = None


@dataclass
class Answer:
    """What a model said.

    Attributes:
        question: To which question.
        text: Without the prompt and special tokens.
        ended: Whether it ended by itself; False where it was cut.
    """

    question: Question
    text: str
    ended: bool


@dataclass
class Session:
    """One stage of one model under evaluation.

    Attributes:
        folder: Where results are.
        stage: The stage's name.
        digest: Names the weights that answer, see `tuna_peft.models.stack.any_model.model_digest`: the base and the
            stage's adapters, from bottom to top. PEFT calls adapters active even where they are disabled.
        model: With these adapters active, and no others.
        tokenizer: Its tokenizer.
        journal: Keeps what was generated.
        batch_size: Prompts at once.
    """

    folder: Path
    stage: str
    digest: dict[str, Any]
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    journal: Journal
    batch_size: int = 32

    def answers(
        self, questions: Sequence[Question], max_new_tokens: int, task: str
    ) -> tuple[list[Answer], list[Exclusion]]:
        """Greedy answers, in the order of the questions, and the questions that have no room for one.

        Every answer goes into the journal as it ends: interrupted work asks only for what is missing.
        """
        prompts = [self._ids(question) for question in questions]
        room = (context_of(self.model) or float("inf")) - max_new_tokens
        fits = [index for index, ids in enumerate(prompts) if len(ids) <= room]
        keys = {index: self._key(prompts[index], max_new_tokens) for index in fits}
        first = {key: index for index, key in reversed(keys.items())}  # equal prompts are asked once
        asked = sorted(first.values())
        done = {place for place, index in enumerate(asked) if keys[index] in self.journal}
        for generated in stream_responses(
            self.model, self.tokenizer, [prompts[index] for index in asked], max_new_tokens=max_new_tokens,
            batch_size=self.batch_size, done=done, description=f"{task} ({self.stage})",
        ):  # fmt: skip
            value = {"text": generated.texts[0], "ended": generated.ended[0]}
            self.journal.add(keys[asked[generated.index]], value)
        answers = [Answer(questions[index], **self.journal[keys[index]]) for index in fits]
        without = [question.id for index, question in enumerate(questions) if index not in keys]
        reason = f"the prompt leaves no room for {max_new_tokens} new tokens in the model's context"
        return answers, [Exclusion.of(reason, without)] if without else []

    def _ids(self, question: Question) -> list[int]:
        if question.ids is None:
            question.ids = prompt_ids(question.prompt, self.tokenizer)
        return question.ids

    @cached_property
    def _weights(self) -> str:
        adapters = list(self.digest["adapters"].values())
        return content_key(**{**self.digest, "adapters": adapters}, dtype=str(next(self.model.parameters()).dtype))

    def _key(self, ids: list[int], max_new_tokens: int) -> str:
        return content_key(weights=self._weights, prompt=ids, max_new_tokens=max_new_tokens)
