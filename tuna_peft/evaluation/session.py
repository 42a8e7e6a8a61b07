"""A model under evaluation and its greedy answers, each generated once and then cached. Every task uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.ranked import Prompt
from tuna_peft.data.texts import prompt_ids
from tuna_peft.evaluation.results import Exclusion, PromptResult
from tuna_peft.journal import Journal, content_key
from tuna_peft.limits import UNPLANNED_BATCH
from tuna_peft.models.generation.dense import has_room_for_dense
from tuna_peft.models.generation.generate import context_of, stream_responses

JOURNAL = "evaluation/journal.jsonl"
"""The file in which a run caches the answers of its stages."""

BatchSize = Callable[[Sequence[tuple[int, Sequence[int]]], int | None], int]
"""Number of prompts in a batch that fits into memory.

Takes for each prompt its tokens and those of its responses, and the number of new tokens; it is None where responses
are only scored.
"""


@dataclass
class Question:
    """A prompt of a task.

    Attributes:
        id: Unique within the task.
        text: The question as the benchmark words it.
        prompt: `text` in the prompt template, as the model gets it.
        references: Correct answers, if the benchmark has them.
        group: The benchmark's task that it belongs to.
        record: Further values that the scorer needs.
        tools: The tools that the model may call, for the chat template.
        ids: Token ids of `prompt`, kept from its first use because all stages have the same tokenizer.
    """

    id: str
    text: str
    prompt: Prompt
    references: list[str] = field(default_factory=list)
    group: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None
    ids: list[int] | None = None


@dataclass
class Answer:
    """A model's answer.

    Attributes:
        question: The question that it answers.
        text: The answer without the prompt and special tokens.
        ended: Whether the model ended it; False for a truncated answer.
    """

    question: Question
    text: str
    ended: bool

    def scored(self, scores: dict[str, float | None], **details: Any) -> PromptResult:
        """The result of the question; for `scores` and `details` see `PromptResult`."""
        asked = self.question
        return PromptResult(
            asked.id, asked.text, self.text, scores, references=asked.references, group=asked.group,
            details={**details, "ended": self.ended},
        )  # fmt: skip


@dataclass
class Session:
    """One stage of one model under evaluation.

    Attributes:
        folder: The folder of the run, or of the evaluation.
        stage: The stage's name.
        digest: Identifies the weights that answer, see `tuna_peft.models.stack.any_model.model_digest`: the base and
            the stage's adapters, from bottom to top. PEFT cannot tell: it lists disabled adapters as active.
        model: The model with exactly these adapters active.
        tokenizer: Its tokenizer.
        journal: Cache of the generated answers.
        batch_size: Number of prompts in a batch, or a function that finds it for each task.
    """

    folder: Path
    stage: str
    digest: dict[str, Any]
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    journal: Journal
    batch_size: int | BatchSize = UNPLANNED_BATCH

    def answers(
        self, questions: Sequence[Question], max_new_tokens: int, task: str
    ) -> tuple[list[Answer], list[Exclusion]]:
        """Greedy answers, in the order of the questions, and the questions whose prompt leaves no room for an answer.

        Each answer is cached when it ends, so an interrupted evaluation generates only what is missing.
        """
        prompts = []
        for question in questions:
            question.ids = question.ids or prompt_ids(question.prompt, self.tokenizer, question.tools)
            prompts.append(question.ids)
        room = (context_of(self.model) or float("inf")) - max_new_tokens
        fits = [index for index, ids in enumerate(prompts) if len(ids) <= room]
        keys = {index: self._key(prompts[index], max_new_tokens) for index in fits}
        first = {key: index for index, key in reversed(keys.items())}  # equal prompts are generated once
        asked = sorted(first.values())
        done = {place for place, index in enumerate(asked) if keys[index] in self.journal}
        size = self.size(task, [(len(prompts[index]), (0,)) for index in asked], max_new_tokens, begun=bool(done))
        dense = self.journal.settle("dense", has_room_for_dense(self.model), before=False)
        for generated in stream_responses(
            self.model, self.tokenizer, [prompts[index] for index in asked], max_new_tokens=max_new_tokens,
            batch_size=size, done=done, dense=dense, description=f"{task} ({self.stage})",
        ):  # fmt: skip
            value = {"text": generated.texts[0], "ended": generated.ended[0]}
            self.journal.add(keys[asked[generated.index]], value)
        answers = [Answer(questions[index], **self.journal[keys[index]]) for index in fits]
        without = [question.id for index, question in enumerate(questions) if index not in keys]
        reason = f"the prompt leaves no room for {max_new_tokens} new tokens in the model's context"
        return answers, [Exclusion.of(reason, without)] if without else []

    def size(
        self,
        task: str,
        rows: Sequence[tuple[int, Sequence[int]]],
        new_tokens: int | None = None,
        *,
        begun: bool = False,
    ) -> int:
        """Number of prompts in a batch of a task: the same for all stages, and after an interruption.

        Args:
            task: Name of the task.
            rows: Tokens of each prompt and of its responses.
            new_tokens: Number of new tokens; None where responses are only scored.
            begun: Whether there are answers already; a version that did not record the size took `UNPLANNED_BATCH`.
        """
        if isinstance(self.batch_size, int):
            return self.batch_size
        size = UNPLANNED_BATCH if begun or not rows else self.batch_size(rows, new_tokens)
        return int(self.journal.settle(f"batch_size of {task}", size, before=size))

    @cached_property
    def _weights(self) -> str:
        adapters = list(self.digest["adapters"].values())
        return content_key(**{**self.digest, "adapters": adapters}, dtype=str(next(self.model.parameters()).dtype))

    def _key(self, ids: list[int], max_new_tokens: int) -> str:
        return content_key(weights=self._weights, prompt=ids, max_new_tokens=max_new_tokens)
