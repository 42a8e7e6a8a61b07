"""Probabilistic ranking with a teacher on a completions server."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.ranked import Prompt, Record
from tuna_peft.errors import UserError
from tuna_peft.feedback.answering import answer_all
from tuna_peft.feedback.scored import Scored, ScoreReport, encode_in_order, is_logprob, scored_records
from tuna_peft.feedback.server import BadAnswer, Reply, Server, choice_text, choices
from tuna_peft.feedback.settings import ScoreSettings
from tuna_peft.feedback.spending import Estimate, Usage, estimate_tokens
from tuna_peft.journal import Journal, content_key


class Question(NamedTuple):
    """One request.

    Args:
        key: Key of the answer in the journal.
        ask: Sends the request and returns the answer.
        tokens_in: Estimated tokens of the request.
        tokens_out: Maximum tokens of the answer.
    """

    key: str
    ask: Callable[[], Any]
    tokens_in: int
    tokens_out: int


def score_with_server(
    rows: Sequence[Record],
    settings: ScoreSettings,
    journal: Journal,
    agree: Callable[[Estimate], None] = lambda estimate: None,
) -> tuple[list[Record], ScoreReport]:
    """Ranks by log-probabilities from a server: those of the rows' completions, or of responses that it generates.

    Args:
        rows: `{"id", "prompt"}`, with `completions` unless the server generates; optional `reference`.
        settings: With `server`.
        journal: Saves every answer as it arrives; what it has is not asked again.
        agree: Called with the estimate before anything is asked; may raise an error.

    Raises:
        UserError: Some requests have no answer (unless `on_no_answer` is `skip`), or no row can be ranked.
    """
    assert settings.server is not None
    server, report = Server(settings.server), ScoreReport()
    teacher = _Generating(server, settings) if settings.generate else _Scoring(server, settings, report)
    asked = [_questions(teacher, row, report) for row in rows]
    questions = {question.key: question for of_row in asked for question in of_row}
    for key in questions:
        if key in journal:
            server.spending.count(Usage(1, *journal[key]["usage"]))
    missing = [(one.tokens_in, one.tokens_out) for key, one in questions.items() if key not in journal]
    agree(server.spending.estimate(len(questions) - len(missing), missing))
    outcome = answer_all(
        journal, questions, lambda question: question.ask(), in_flight=settings.server.in_flight, description="scoring"
    )
    report.found, report.asked = outcome.found, outcome.asked
    if outcome.unanswered and settings.on_no_answer == "error":
        reason = next(iter(outcome.unanswered.values()))
        raise UserError(
            f"{len(outcome.unanswered)} of {len(questions)} requests have no answer; the first: {reason}",
            where=settings.server.base_url,
            fix="All other answers are saved: run the same command again to ask these, or set `on_no_answer: skip`.",
        )
    answers: list[Scored | None] = []
    for row, of_row in zip(rows, asked, strict=True):
        if not of_row:
            answers.append(None)
        elif all(question.key in journal for question in of_row):
            answers.append(teacher.scored(row, [journal[question.key] for question in of_row], report))
        else:
            report.count_skipped("no answer")
            answers.append(None)
    name = {"model": settings.server.model, "revision": None, "server": settings.server.base_url}
    report.cost = server.spending.cost
    return scored_records(rows, answers, settings.length_penalty, name, report), report


def _questions(teacher: _Scoring | _Generating, row: Record, report: ScoreReport) -> list[Question]:
    """What the teacher asks about a row; nothing, and counted, if its chat template refuses the row."""
    try:
        return teacher.questions(row)
    except BadRow as error:
        report.count_skipped(error.reason)
        return []


class _Scoring:
    """Asks for the log-probabilities of a prompt followed by a response."""

    def __init__(self, server: Server, settings: ScoreSettings, report: ScoreReport):
        self.server, self.report = server, report
        self.tokenizer = None if settings.tokenizer is None else server_tokenizer(settings.tokenizer)

    def questions(self, row: Record) -> list[Question]:
        """One question for each completion."""
        if self.tokenizer is not None:
            encoded = encode_in_order(row, self.tokenizer, None, self.report)
            ids, questions = encoded["prompt_ids"], []
            for response, skip in zip(encoded["completions_ids"], encoded["completion_skips"], strict=True):
                tokens, first = ids + response, len(ids) + skip
                ask = functools.partial(self._ask_ids, tokens, first)
                questions.append(Question(self._key(tokens, first), ask, len(tokens), 1))
            return questions
        prompt = text_prompt(row)
        return [
            Question(
                self._key(prompt + response, len(prompt)), functools.partial(self._ask_text, prompt, response),
                estimate_tokens(prompt + response), 1,
            )
            for response in row["completions"]
        ]  # fmt: skip

    def scored(self, row: Record, answers: list[dict[str, Any]], report: ScoreReport) -> Scored | None:
        """The sums and lengths of a row."""
        return Scored(
            row["completions"], [answer["logprob"] for answer in answers], [answer["length"] for answer in answers]
        )

    def _key(self, sent: str | list[int], first: int) -> str:
        return content_key(what="score", server_model=self.server.settings.model, prompt=sent, first=first)

    def _ask_text(self, prompt: str, response: str) -> dict[str, Any]:
        # Generates one token, which is ignored: some servers read `max_tokens=0` as no limit.
        reply = self.server.complete(prompt + response, echo=True, logprobs=1, max_tokens=1, temperature=0)
        return _answer(echoed_logprobs(reply, prompt, response), reply)

    def _ask_ids(self, tokens: list[int], first: int) -> dict[str, Any]:
        reply = self.server.complete(tokens, prompt_logprobs=0, max_tokens=1, temperature=0)
        return _answer(prompt_logprobs(reply, tokens)[first:], reply)


class _Generating:
    """Asks for responses together with their log-probabilities."""

    def __init__(self, server: Server, settings: ScoreSettings):
        assert settings.generate is not None
        self.server, self.settings = server, settings.generate

    def questions(self, row: Record) -> list[Question]:
        """One question for each prompt."""
        options = self.settings.model_dump()
        key = content_key(
            what="generate", server_model=self.server.settings.model, prompt=row["prompt"], options=options
        )
        tokens = estimate_tokens(json.dumps(row["prompt"], ensure_ascii=False))
        most = self.settings.n * self.settings.max_tokens
        return [Question(key, functools.partial(self._ask, row["prompt"]), tokens, most)]

    def scored(self, row: Record, answers: list[dict[str, Any]], report: ScoreReport) -> Scored | None:
        """The responses that are not empty, with their sums and lengths."""
        found = [sample for sample in answers[0]["samples"] if sample["text"]]
        if not found:
            report.count_skipped("all responses are empty")
            return None
        report.cut += sum(sample["cut"] for sample in found)
        return Scored(
            [sample["text"] for sample in found],
            [sample["logprob"] for sample in found],
            [sample["length"] for sample in found],
        )

    def _ask(self, prompt: Prompt) -> dict[str, Any]:
        options = self.settings.model_dump()
        if isinstance(prompt, str):
            reply = self.server.complete(prompt, logprobs=1, **options)
        else:
            reply = self.server.chat(prompt, logprobs=True, **options)
        samples = [generated_sample(choice) for choice in choices(reply, self.settings.n)]
        return {"samples": samples, "usage": [reply.usage.tokens_in, reply.usage.tokens_out]}


def text_prompt(row: Record) -> str:
    """The prompt of a row, as a completions server takes it.

    Raises:
        UserError: It is a list of messages.
    """
    if isinstance(row["prompt"], str):
        return row["prompt"]
    raise UserError(
        "the prompt is a list of messages, and a completions server takes text",
        where=f"prompt {row.get('id')}",
        fix="Give `tokenizer`, whose chat template formats the messages, or use another prompt template.",
    )


def echoed_logprobs(reply: Reply, prompt: str, response: str) -> list[float]:
    """The log-probabilities of a response's tokens, from a reply to a request with `echo`.

    A token that begins in the prompt and ends in the response belongs to the response, as in training.

    Raises:
        BadAnswer: The reply has no log-probabilities, or those of another text.
    """
    [choice] = choices(reply)
    given = choice.get("logprobs")
    found = given if isinstance(given, dict) else {}
    tokens, values = found.get("tokens"), found.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        raise BadAnswer("the answer has no log-probabilities of the prompt: does the server support `echo`?")
    if not all(isinstance(token, str) for token in tokens):
        raise BadAnswer("the answer's tokens are not text")
    starts = _starts(tokens, found.get("text_offset"), prompt + response)
    ends = [*starts[1:], starts[-1] + len(tokens[-1])] if starts else []
    chosen = [
        value
        for value, start, end in zip(values, starts, ends, strict=True)
        if end > len(prompt) and start < len(prompt) + len(response)
    ]
    return _checked(chosen)


def prompt_logprobs(reply: Reply, tokens: Sequence[int]) -> list[float | None]:
    """The log-probability of each token of the prompt, from vLLM's `prompt_logprobs` (None for the first).

    Raises:
        BadAnswer: The reply has no log-probabilities, or those of other tokens.
    """
    [choice] = choices(reply)
    found = choice.get("prompt_logprobs")
    if not isinstance(found, list) or len(found) != len(tokens):
        raise BadAnswer("the answer has no `prompt_logprobs` for the tokens sent: leave `tokenizer` out to use `echo`")
    values: list[float | None] = []
    for place, (entry, token) in enumerate(zip(found, tokens, strict=True)):
        mine = entry.get(str(token)) if isinstance(entry, dict) else None
        value = mine.get("logprob") if isinstance(mine, dict) else None
        if place and not is_logprob(value):
            raise BadAnswer(f"`prompt_logprobs` has no log-probability of token {place}")
        values.append(None if value is None else float(value))
    return values


def generated_sample(choice: dict[str, Any]) -> dict[str, Any]:
    """Text, summed log-probability and length of one generated response, from a reply to `complete` or `chat`.

    Raises:
        BadAnswer: The response has no text, or not a log-probability for every token.
    """
    found = choice.get("logprobs")
    if "message" in choice:
        content = found.get("content") if isinstance(found, dict) else None
        values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in content or []]
    else:
        given = found.get("token_logprobs") if isinstance(found, dict) else None
        values = given if isinstance(given, list) else []
    text = choice_text(choice)
    if text and not values:
        raise BadAnswer("the answer has no log-probabilities: does the server support `logprobs`?")
    total = sum(_checked(values)) if values else 0.0
    cut = choice.get("finish_reason") == "length"
    return {"text": text.strip(), "logprob": total, "length": len(values), "cut": cut}


def _starts(tokens: list[str], offsets: Any, text: str) -> list[int]:
    """Position in `text` at which each token begins."""
    joined, places = "", []
    for token in tokens:
        places.append(len(joined))
        joined += token
    before = joined.find(text)  # BOS may come first
    if before >= 0:
        return [place - before for place in places]
    # Tokens that are parts of a character do not join to the text; then use the server's offsets, in characters.
    sound = (
        isinstance(offsets, list)
        and len(offsets) == len(tokens)
        and all(isinstance(place, int) and not isinstance(place, bool) for place in offsets)
        and offsets == sorted(offsets)
    )
    if not sound:
        raise BadAnswer("the answer's tokens are not those of the text that was sent")
    return offsets


def _checked(values: Sequence[Any]) -> list[float]:
    if not values:
        raise BadAnswer("the answer has no token of the response")
    for value in values:
        if not is_logprob(value):
            raise BadAnswer(f"{value!r:.40} is not a log-probability")
    return [float(value) for value in values]


def _answer(values: Sequence[float | None], reply: Reply) -> dict[str, Any]:
    found = _checked(values)
    return {"logprob": sum(found), "length": len(found), "usage": [reply.usage.tokens_in, reply.usage.tokens_out]}


def server_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher on a server.

    Raises:
        UserError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer {name!r}: {reason}", fix="Check the path or Hub id.") from error
