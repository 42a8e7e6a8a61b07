"""Sampling from an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`) that serves the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tuna_peft.data.ranked import Prompt, Record
from tuna_peft.data.texts import prompt_ids, prompt_text
from tuna_peft.errors import UserError
from tuna_peft.feedback.answering import answer_all
from tuna_peft.feedback.server import BadAnswer, Refused, Server, choice_text, choices
from tuna_peft.feedback.settings import SampleServer, SampleSettings
from tuna_peft.feedback.spending import Estimate, Usage
from tuna_peft.feedback.vllm_sampler import seed_of
from tuna_peft.journal import Journal
from tuna_peft.limits import response_room

logger = logging.getLogger("tuna_peft")

PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Turns off what engines do by default or read from `generation_config.json` (llama.cpp: top_k 40 and min_p 0.05)."""


class _Way(NamedTuple):
    """How a server is asked for n responses: in one request or in n, with the fields of `PLAIN` or without."""

    together: bool
    plain: bool


_WAYS = (_Way(True, True), _Way(False, True), _Way(True, False), _Way(False, False))
"""In the order of trying: llama.cpp limits `n`; `transformers serve` and OpenAI refuse unknown fields."""


class ServerSampler:
    """Samples from a model behind a server.

    Except for the server's rounding, a prompt's samples depend on its seed and not on other prompts, if the server
    respects seeds.

    Args:
        settings: Where the server is.
        tokenizer: The model's tokenizer.
        digest: What the model's responses depend on, as plain JSON; with server and model it goes into the journal's
            keys.
        context: Maximum tokens of a prompt with its response; None for no limit.
        ready: Called once, before the first request for samples: waits until the server serves the model.
        agree: Called with the estimate of each attempt before its requests; may raise an error.
    """

    def __init__(
        self,
        settings: SampleServer,
        tokenizer: PreTrainedTokenizerBase,
        digest: Mapping[str, Any],
        *,
        context: int | None = None,
        ready: Callable[[], None] = lambda: None,
        agree: Callable[[Estimate], None] = lambda estimate: None,
    ):
        self.tokenizer, self.context = tokenizer, context
        self.identity = {"backend": "server", "server": settings.base_url, "model": settings.model, **digest}
        self._settings, self._server = settings, Server(settings)
        self._ready: Callable[[], None] | None = ready
        self._agree, self._way = agree, 0

    def fill(
        self,
        journal: Journal,
        prompts: Mapping[str, tuple[Record, Sequence[int]]],
        settings: SampleSettings,
        *,
        temperature: float,
        seed: str,
    ) -> None:
        """Puts `settings.n` samples of every prompt into the journal, each prompt's as soon as they arrive.

        After Ctrl-C the answers to requests that are already sent are still kept.

        Args:
            prompts: By the journal's key: the prompt's record and its tokens.

        Raises:
            UserError: Some prompts have no samples; all others are in the journal.
        """
        missing = [(len(ids), settings.n * settings.max_new_tokens) for key, (_, ids) in prompts.items()
                   if key not in journal]  # fmt: skip
        for key, (_, ids) in prompts.items():
            if key in journal:
                self._server.spending.count(Usage(1, len(ids), sum(journal[key]["lengths"])))
        if not missing:
            return
        self._agree(self._server.spending.estimate(len(prompts) - len(missing), missing))
        if self._ready is not None:
            self._ready()
            self._ready = None
        outcome = answer_all(
            journal,
            prompts,
            lambda asked: self._sample(*asked, settings, temperature, seed),
            in_flight=self._settings.in_flight,
            description=f"sampling, temperature {temperature:g}",
        )
        if outcome.unanswered:
            reason = next(iter(outcome.unanswered.values()))
            raise UserError(
                f"{len(outcome.unanswered)} of {len(prompts)} prompts have no samples; the first: {reason}",
                where=self._settings.base_url,
                fix="All other samples are saved: run the same command again to resume.",
            )

    def greedy(self, prompt: Prompt, max_new_tokens: int) -> str:
        """The most likely response.

        Raises:
            UserError: The server does not answer.
        """
        ids = prompt_ids(prompt, self.tokenizer)
        [choice] = self._ask({"prompt": prompt}, ids, 1, 0, max_tokens=max_new_tokens, temperature=0.0)
        return choice_text(choice).strip()

    def _sample(
        self, record: Record, ids: Sequence[int], settings: SampleSettings, temperature: float, seed: str
    ) -> dict[str, list[Any]]:
        """The journal's entry of a prompt: `texts`, `lengths` in our tokenizer's tokens, and `ended`."""
        room = response_room(settings.max_new_tokens, len(ids), self.context)
        found = self._ask(
            record, ids, settings.n, seed_of(seed, ids),
            max_tokens=room, temperature=temperature, top_p=settings.top_p,
        )  # fmt: skip
        texts = [choice_text(choice).strip() for choice in found]
        ended = [_ended(choice) for choice in found]
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {
            "texts": texts,
            "lengths": [len(text) + end for text, end in zip(tokens, ended, strict=True)],
            "ended": ended,
        }

    def _ask(self, record: Record, ids: Sequence[int], n: int, seed: int, **options: Any) -> list[dict[str, Any]]:
        """`n` choices, in the first way that the server accepts; the next prompt begins with that way."""
        first: Refused | BadAnswer | None = None
        for number in range(self._way, len(_WAYS)):
            way = _WAYS[number]
            if not way.together and n == 1:
                continue  # as the way before
            more = {**options, **(PLAIN if way.plain else {})}
            try:
                if way.together:
                    several = {"n": n} if n > 1 else {}
                    found = choices(self._post(record, ids, seed=seed, **several, **more), n)
                else:
                    found = [choices(self._post(record, ids, seed=seed + k, **more))[0] for k in range(n)]
            except (Refused, BadAnswer) as error:
                first = first or error
                continue
            if n > 1 and number > self._way:
                self._way = number
                if not way.plain:
                    logger.warning("the server refuses top_k, min_p and repetition_penalty: its own values apply")
            return found
        assert first is not None
        raise first

    def _post(self, record: Record, ids: Sequence[int], **options: Any) -> Any:
        prompt, tools = record["prompt"], record.get("tools")
        if self._settings.chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self._server.chat(messages, **({"tools": tools} if tools else {}), **options)
        return self._server.complete(self._as_sent(prompt, tools, ids), **options)

    def _as_sent(self, prompt: Prompt, tools: Any, ids: Sequence[int]) -> str | list[int]:
        """The text that a server tokenizes to `ids`; the tokens themselves where there is no such text.

        Servers add BOS as the tokenizer does, and would add it twice to a chat template that writes it.
        """
        text = prompt_text(prompt, self.tokenizer, tools=tools)
        for one in (text, text.removeprefix(self.tokenizer.bos_token or "")):
            if self.tokenizer(one)["input_ids"] == list(ids):
                return one
        return list(ids)


def _ended(choice: dict[str, Any]) -> bool:
    """Whether the response ended by itself; False where it was cut.

    Raises:
        BadAnswer: The server says neither.
    """
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"the response ended for the reason {reason!r:.40}, not `stop` or `length`")
    return reason == "stop"
