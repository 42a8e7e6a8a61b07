"""What a server's answers cost: estimated before, counted after, and never above a limit."""

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
    """Tokens of one answer or of many.

    Args:
        requests: Answers counted.
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
    """In any currency, per million tokens."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def cost(self, usage: Usage) -> float:
        """What `usage` costs."""
        return (usage.tokens_in * self.tokens_in + usage.tokens_out * self.tokens_out) / 1e6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is still to be asked, before it is asked.

    Args:
        found: Answers that the journal has.
        requests: Answers to ask for.
        tokens_in: About the tokens of their prompts.
        tokens_out: The most tokens that they can have; most judges use a fraction.
        cost: At most, if each is readable at the first attempt; None where no prices are known.
    """

    found: int
    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None


class CostLimitReached(UserError):
    """The next request could cost more than is left."""


class Spending:
    """Counts tokens from several threads, and stops requests that could go above `max_cost`.

    A request reserves what it can cost at most, and is settled with what it did cost.

    Args:
        prices: See `Prices`.
        max_cost: None for no limit. What is added with `count` (answers of an earlier, interrupted run) is part of it.
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
        """Spent so far."""
        return self.prices.cost(self.usage)

    def count(self, usage: Usage) -> None:
        """Adds what was spent already."""
        with self._guard:
            self.usage += usage

    @contextmanager
    def request(self, worst: Usage) -> Iterator[list[Usage]]:
        """Around one request; put what it used into the list that is yielded. Nothing in it counts nothing.

        Raises:
            CostLimitReached: Before the request, if `worst` does not fit beside what is spent and reserved.
        """
        reserve = self.prices.cost(worst)
        with self._guard:
            if self.max_cost is not None and self.cost + self._reserved + reserve > self.max_cost:
                spent = f"{self.cost:.4f} of at most {self.max_cost:g} is spent"
                raise CostLimitReached(
                    f"{spent}, and another answer could cost {reserve:.4f}",
                    fix="Every answer so far is kept. Run the same command with a higher limit to go on.",
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
    """About how many tokens `text` has: one for four ASCII characters, as in English, one for any other character."""
    other = sum(not character.isascii() for character in text)
    return -(-(len(text) - other) // 4) + other
