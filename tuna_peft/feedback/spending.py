"""Cost of a server's answers: estimated before, counted after, and never above a limit."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
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
class Prices:
    """Prices of a million tokens, in any currency."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def cost(self, usage: Usage) -> float:
        """Cost of `usage`."""
        return (usage.tokens_in * self.tokens_in + usage.tokens_out * self.tokens_out) / 1e6


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
        prices: See `Prices`.
        max_cost: None for no limit. It includes what is added with `count`: answers of an earlier, interrupted run.
    """

    def __init__(self, prices: Prices | None = None, max_cost: float | None = None):
        self.prices, self.max_cost = prices or Prices(), max_cost
        self.usage = Usage()
        self._reserved = 0.0
        self._guard = threading.Lock()

    @classmethod
    def for_server(cls, settings: ServerSettings) -> Spending:
        """A counter with the prices and the limit of the settings; without prices nothing costs anything."""
        return cls(Prices(settings.price_in or 0.0, settings.price_out or 0.0), settings.max_cost)

    @property
    def cost(self) -> float:
        """Cost so far."""
        return self.prices.cost(self.usage)

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
        reserve = self.prices.cost(worst)
        with self._guard:
            if self.max_cost is not None and self.cost + self._reserved + reserve > self.max_cost:
                spent = f"{self.cost:.4f} of at most {self.max_cost:g} is spent"
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
