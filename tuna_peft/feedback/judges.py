"""Three kinds of judges: a model on a server, a model on this machine, a Python function.

`tuna_peft.feedback.judge` makes the questions and reads the answers; a judge puts its answers into the journal.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import numbers
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tuna_peft.data.ranked import Prompt
from tuna_peft.data.verdict import Unreadable, read_verdict
from tuna_peft.feedback.answering import Answering, answer_all
from tuna_peft.feedback.protocol import answer_schema, judge_messages
from tuna_peft.feedback.server import BadAnswer, Refused, Reply, RequestFailed, Server, message_text
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.feedback.spending import Spending, Usage
from tuna_peft.graders import BUILTIN, load_grader
from tuna_peft.journal import Journal


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt with its responses in the order in which the judge sees them.

    Args:
        prompt: Text or messages.
        responses: The responses in that order.
        record: The record that the prompt came from, for Python functions.
        guidance: The user's additional criteria.
        where: The prompt's id, for errors.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    record: dict[str, Any]
    guidance: str | None
    where: str

    @functools.cached_property
    def messages(self) -> list[dict[str, str]]:
        """The messages that are sent to a model."""
        return judge_messages(self.prompt, self.responses, self.guidance)


class Judge(Protocol):
    """Puts answers to questions into a journal.

    An answer is `{"text"}` with a verdict that can be read, `{"scores"}` by a Python function, or
    `{"failed": reason, "text"}` when no attempt could be read; with `usage` where tokens are counted.
    """

    def key_parts(self, question: Question) -> dict[str, Any]:
        """Everything that the answer to `question` depends on; the journal's key is a hash of it."""

    def answer(self, journal: Journal, questions: Mapping[str, Question], description: str) -> Answering:
        """Puts the missing answers into the journal, see `answer_all`."""


def make_judge(settings: JudgeSettings, spending: Spending | None = None, *, device: str = "auto") -> Judge:
    """The judge that the settings name; a model is loaded when the first question is asked.

    Args:
        settings: Which judge.
        spending: Counts what a server's answers cost; by default a new counter.
        device: Where a judge on this machine runs, see `load_local_model`.

    Raises:
        UserError: There is no such function, or no `openai` package.
    """
    if settings.server is not None:
        return ServerJudge(settings, Server(settings.server, spending))
    if settings.model is not None:
        return LocalJudge(settings, settings.model, device)
    assert settings.function is not None
    return FunctionJudge(settings.function)


def failed(answer: Mapping[str, Any]) -> bool:
    """Whether an answer in the journal is the record of a failure."""
    return "failed" in answer


def why_unreadable(text: str, cut: bool, responses: int) -> str | None:
    """Why an answer is not a verdict; None if it is one."""
    if cut:
        return "the answer is truncated at `max_tokens`"
    try:
        read_verdict(text, responses)
    except Unreadable as error:
        return str(error)
    return None


def _failure(reason: str, text: str) -> dict[str, Any]:
    return {"failed": reason, "text": text[:2000]}


def _attempt_temperature(settings: JudgeSettings, attempt: int) -> float:
    # At temperature 0 a second attempt would give the same answer.
    return min(settings.temperature + 0.3 * attempt, max(settings.temperature, 1.0))


# A model on a server


@dataclasses.dataclass(frozen=True)
class _Dialect:
    """The request fields that the server accepts: all of them at first, less those that it rejects."""

    structured: bool
    temperature: bool = True
    limit: str = "max_tokens"

    def without(self, complaint: str) -> _Dialect | None:
        """Without the field that the error message is about; None if nothing is left to drop."""
        if self.limit == "max_tokens" and "max_completion_tokens" in complaint:
            return dataclasses.replace(self, limit="max_completion_tokens")
        if self.temperature and "temperature" in complaint:
            return dataclasses.replace(self, temperature=False)
        if self.structured:
            return dataclasses.replace(self, structured=False)
        return None


class ServerJudge:
    """A chat model on a server."""

    def __init__(self, settings: JudgeSettings, server: Server):
        self.settings, self.server = settings, server
        self._dialect = _Dialect(settings.structured)

    def key_parts(self, question: Question) -> dict[str, Any]:
        """The model's name and not the address: a server may move, but another name means another model."""
        judge = {"server_model": self.server.settings.model, "temperature": self.settings.temperature}
        return {"judge": judge, "messages": question.messages}

    def answer(self, journal: Journal, questions: Mapping[str, Question], description: str) -> Answering:
        """Sends up to `in_flight` questions at once."""
        in_flight = self.server.settings.in_flight
        return answer_all(journal, questions, self._ask, in_flight=in_flight, description=description)

    def _ask(self, question: Question) -> dict[str, Any]:
        usage, reason, text = Usage(), "", ""
        for attempt in range(self.settings.attempts):
            try:
                reply = self._request(question, attempt)
                usage += reply.usage
                text, cut = message_text(reply)
            except BadAnswer as error:
                reason, text = error.what, ""
                continue
            found = why_unreadable(text, cut, len(question.responses))
            if found is None:
                return {"text": text, "usage": [usage.tokens_in, usage.tokens_out]}
            reason = found
        return {**_failure(reason, text), "usage": [usage.tokens_in, usage.tokens_out]}

    def _request(self, question: Question, attempt: int) -> Reply:
        dialect = self._dialect
        while True:
            try:
                reply = self._send(question, attempt, dialect)
            except Refused as refusal:
                simpler = dialect.without(refusal.what)
                if simpler is None:
                    raise
                dialect = simpler
            else:
                # Only after a success: the server may have rejected this question, not the fields.
                self._dialect = dialect
                return reply

    def _send(self, question: Question, attempt: int, dialect: _Dialect) -> Reply:
        options: dict[str, Any] = {dialect.limit: self.settings.max_tokens}
        if dialect.temperature:
            options["temperature"] = _attempt_temperature(self.settings, attempt)
        if dialect.structured:
            schema = {"name": "ranking", "strict": True, "schema": answer_schema(len(question.responses))}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return self.server.chat(question.messages, **options)


# A model on this machine


class LocalJudge:
    """A causal LM on this machine, which answers in batches."""

    def __init__(self, settings: JudgeSettings, model: str, device: str):
        self.settings, self.model, self.device = settings, model, device

    def key_parts(self, question: Question) -> dict[str, Any]:
        """The model's name and, if it is a folder, its files."""
        settings = {name: getattr(self.settings, name) for name in ("revision", "quantization", "temperature")}
        return {"judge": {"local_model": self.model, "files": self._files, **settings}, "messages": question.messages}

    @functools.cached_property
    def _files(self) -> list[list[Any]]:
        """Name, size and modification time of every file: a model that was trained again is asked again."""
        folder = Path(self.model)
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in found]

    def answer(self, journal: Journal, questions: Mapping[str, Question], description: str) -> Answering:
        """Asks all questions in batches, and those whose answer cannot be read up to `attempts` times.

        After an interruption the batches are formed as before, so that rounding does not change an answer: questions
        that the journal has an answer to keep their place in a batch, but nothing is generated for them.
        """
        from tuna_peft.data.texts import prompt_ids
        from tuna_peft.feedback.local_model import load_local_model
        from tuna_peft.models.generation.dense import has_room_for_dense
        from tuna_peft.models.generation.generate import context_of, stream_responses

        outcome = Answering(found=sum(key in journal for key in questions))
        if outcome.found == len(questions):
            return outcome
        settings = self.settings
        loaded = load_local_model(settings, self.device)
        context = context_of(loaded.model) or sys.maxsize
        prompts = {}
        for key, question in questions.items():
            # A model without a chat template continues a text.
            text = question.messages if loaded.tokenizer.chat_template else question.messages[0]["content"] + "\n\n"
            prompts[key] = prompt_ids(text, loaded.tokenizer)
            if len(prompts[key]) >= context:
                tokens = len(prompts.pop(key))
                outcome.unanswered[key] = f"{tokens} tokens do not fit into the judge's context of {context}"
        dense = journal.settle("dense", has_room_for_dense(loaded.model), before=False)
        left = list(prompts)
        for attempt in range(settings.attempts):
            for generated in stream_responses(
                loaded.model, loaded.tokenizer, [prompts[key] for key in left],
                temperature=_attempt_temperature(settings, attempt), max_new_tokens=settings.max_tokens,
                seed=f"{settings.seed}-{attempt}", batch_size=settings.questions_at_once,
                done={i for i, key in enumerate(left) if key in journal}, dense=dense,
                description=f"{description}, attempt {attempt + 1}" if attempt else description,
            ):  # fmt: skip
                key, [text], [ended] = left[generated.index], generated.texts, generated.ended
                reason = why_unreadable(text, not ended, len(questions[key].responses))
                if reason is None or attempt + 1 == settings.attempts:
                    answer = {"text": text} if reason is None else _failure(reason, text)
                    journal.add(key, {**answer, "attempt": attempt})
                    outcome.asked += 1
            left = [key for key in left if key not in journal or journal[key]["attempt"] > attempt]
        return outcome


# A Python function


class FunctionJudge:
    """A grader: `function(record, response)` returns a number."""

    def __init__(self, name: str):
        self.name = name
        self._grade = load_grader(name, "judge.function")

    def key_parts(self, question: Question) -> dict[str, Any]:
        """The function's name, and the source code of its module."""
        return {
            "judge": {"function": self.name, "source": self._source},
            "record": hashlib.sha256(repr(question.record).encode("utf-8", "backslashreplace")).hexdigest(),
            "prompt": question.prompt,
            "responses": list(question.responses),
        }

    @functools.cached_property
    def _source(self) -> str | None:
        module = sys.modules[BUILTIN.get(self.name, self.name).partition(":")[0]]
        try:
            return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
        except (OSError, TypeError):  # a compiled module
            return None

    def answer(self, journal: Journal, questions: Mapping[str, Question], description: str) -> Answering:
        """Asks one question after the other."""
        return answer_all(journal, questions, self._ask, description=description)

    def _ask(self, question: Question) -> dict[str, Any]:
        return {"scores": [self._score(question, response) for response in question.responses]}

    def _score(self, question: Question, response: str) -> float:
        try:
            score = self._grade(question.record, response)
        except Exception as error:
            what = f"the judge {self.name} failed with {type(error).__name__}: {error}"
            raise RequestFailed(what, where=question.where) from error
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise RequestFailed(
                f"the judge {self.name} returned {score!r:.60}, not a finite number", where=question.where
            )
        return float(score)
