"""Cost of a server's answers: estimated before, counted after, and never above a limit."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from tuna_peft.feedback.settings import ServerSettings


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of one or more answers.

    Args:
        requests: Number of answers.
        tokens_in: Tokens of their prompts.
        tokens_out: Tokens that were generated.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests, self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of the questions that have no answer yet.

    Args:
        found: Number of questions that the journal has an answer to.
        requests: Number of questions to ask.
        tokens_in: Estimated tokens of their prompts.
        tokens_out: Maximum tokens of the answers; most judges use a fraction of it.
        cost: Maximum cost if every first attempt can be read; None without prices.
    """

    found: int
    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None


class CostLimitReached(UserError):
    """The next request could cost more than the limit leaves."""


class Spending:
    """Counts tokens in several threads, and stops requests that could exceed `max_cost`.

    A request reserves its maximum cost before it is sent; the real cost replaces that when the answer is there.

    Args:
        server: Gives the prices of a million tokens and the limit, which includes what is added with `count`: answers
            of an earlier, interrupted run. Without a server or without prices nothing costs anything.
    """

    def __init__(self, server: ServerSettings | None = None):
        self._prices = (
            None if server is None or server.price_in is None else (server.price_in, server.price_out or 0.0)
        )
        self._max_cost = server.max_cost if server else None
        self.usage = Usage()
        self._reserved = 0.0
        self._guard = threading.Lock()

    @property
    def cost(self) -> float:
        """Cost so far."""
        return self._cost_of(self.usage)

    def estimate(self, found: int, questions: Iterable[tuple[int, int]]) -> Estimate:
        """Estimate of questions with these tokens (prompt, answer), beside `found` ones that are answered."""
        usage = sum((Usage(1, *tokens) for tokens in questions), Usage())
        cost = None if self._prices is None else self._cost_of(usage)
        return Estimate(found, usage.requests, usage.tokens_in, usage.tokens_out, cost)

    def _cost_of(self, usage: Usage) -> float:
        price_in, price_out = self._prices or (0.0, 0.0)
        return (usage.tokens_in * price_in + usage.tokens_out * price_out) / 1e6

    def count(self, usage: Usage) -> None:
        """Adds earlier usage."""
        with self._guard:
            self.usage += usage

    @contextmanager
    def request(self, worst: Usage) -> Iterator[list[Usage]]:
        """Reserves the cost of one request while it runs.

        Put the usage of its answer into the list that is yielded; if the list stays empty, nothing is counted.

        Raises:
            CostLimitReached: Before the request, if `worst` would exceed the limit beside the cost so far and all
                reservations.
        """
        reserve = self._cost_of(worst)
        with self._guard:
            if self._max_cost is not None and self.cost + self._reserved + reserve > self._max_cost:
                spent = f"{self.cost:.4f} of at most {self._max_cost:g} is spent"
                raise CostLimitReached(
                    f"{spent}, and another answer could cost {reserve:.4f}",
                    fix="All answers so far are saved. Run the same command with a higher limit to resume.",
                )
            self._reserved += reserve
        used: list[Usage] = []
        try:
            yield used
        finally:
            with self._guard:
                self._reserved -= reserve
                self.usage = sum(used, self.usage)


def estimate_tokens(text: str) -> int:
    """Estimated tokens of `text`: one for four ASCII characters, as in English, and one for any other character."""
    other = sum(not character.isascii() for character in text)
    return -(-(len(text) - other) // 4) + other
