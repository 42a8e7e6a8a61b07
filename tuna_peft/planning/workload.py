"""How long the data is, in tokens: what memory and time follow from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tuna_peft.limits import LONG_ROW, PAD_TO

# What stands in for data that is not there yet: short instructions with a few answers each, of the lengths of Alpaca's
# prompts and of chat models' answers to them.
ASSUMED_PROMPT, ASSUMED_RESPONSE, ASSUMED_RESPONSES = 100, 200, 4
ASSUMED_ROWS, ASSUMED_HELD_OUT = 10_000, 500


@dataclass(frozen=True)
class Row:
    """One prompt with its responses, in tokens; what responses share beyond the prompt is counted apart (cautious)."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the packed row."""
        return self.prompt + sum(self.responses)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest response."""
        return self.prompt + max(self.responses)


@dataclass(frozen=True)
class Workload:
    """The lengths of a data set.

    Attributes:
        rows: Some of its rows, the longest among them.
        total: How many rows there are.
        source: Where the lengths come from, in words.
    """

    rows: tuple[Row, ...]
    total: int
    source: str

    @classmethod
    def assumed(cls, responses: int, max_length: int | None, total: int, how: str = "") -> Workload:
        """For data that is not here: `total` rows of typical length.

        Args:
            responses: To each prompt; 0 for prompts alone.
            how: Where the total comes from, in words.
        """
        longest = max_length or ASSUMED_PROMPT + ASSUMED_RESPONSE
        prompt = min(ASSUMED_PROMPT, longest // 2)
        source = f"assumed: {total:,} prompts{how} of {prompt} tokens"
        if not responses:
            return cls((Row(prompt, (0,)),), total, source)
        length = min(ASSUMED_RESPONSE, longest - prompt)
        return cls((Row(prompt, (length,) * responses),), total, f"{source} with {responses} response(s) of {length}")

    @classmethod
    def of_prompts(cls, total: int, typical: int, longest: int, source: str) -> Workload:
        """Prompts of which one in a hundred is as long as the longest."""
        return cls((*(Row(typical, (0,)),) * 99, Row(longest, (0,))), total, source)

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of a prompt."""
        return sum(row.prompt for row in self.rows) / len(self.rows)

    @property
    def tokens(self) -> float:
        """Mean tokens of a packed row."""
        return sum(row.tokens for row in self.rows) / len(self.rows)

    @property
    def response_tokens(self) -> float:
        """Mean tokens that carry loss, by row."""
        return sum(sum(row.responses) for row in self.rows) / len(self.rows)

    @property
    def attended(self) -> float:
        """Mean pairs of a token and a key that attention computes, by packed row; halved by no kernel's causality."""
        return sum(_attended(row) for row in self.rows) / len(self.rows)


def _attended(row: Row) -> float:
    if row.tokens < LONG_ROW:
        return row.tokens**2
    return row.prompt**2 + sum(length * (row.prompt + length) for length in row.responses)


@dataclass(frozen=True)
class ForwardPass:
    """The largest forward pass of a stage.

    Attributes:
        rows: Rows in it.
        width: Tokens of each, padding included.
        targets: Tokens in it that carry loss.
        keys: Of packed rows: keys that all of its segments see, summed: prompt and response for each response.
    """

    rows: int
    width: int
    targets: int
    keys: int | None = None

    @property
    def positions(self) -> int:
        """Tokens that are computed."""
        return self.rows * self.width

    @property
    def by_segment(self) -> bool:
        """Whether attention is computed segment by segment (`tuna_peft.models.forward.segments`), without a mask."""
        return self.keys is not None and self.width >= LONG_ROW


def packed_pass(rows: Sequence[Row], batch_size: int, max_tokens: int | None) -> ForwardPass:
    """The largest pass over packed rows: the longest rows together, within the budget of tokens."""
    longest = max(rows, key=lambda row: row.tokens)
    width = longest.tokens + -longest.tokens % PAD_TO
    count = batch_size if max_tokens is None else max(min(batch_size, max_tokens // width), 1)
    if max_tokens is not None and count < batch_size:
        # Shorter rows may fill the budget better than copies of the longest: the budget is what is reached.
        width = max(width, min(max_tokens, batch_size * width) // count)
    keys = longest.prompt + sum(longest.prompt + response for response in longest.responses)
    return ForwardPass(count, width, count * sum(longest.responses), count * keys)


def padded_pass(rows: Iterable[Row], batch_size: int) -> ForwardPass:
    """The largest pass over one response a row, as supervised fine-tuning makes them."""
    longest = max(rows, key=lambda row: row.longest)
    width = longest.longest + -longest.longest % PAD_TO
    return ForwardPass(batch_size, width, batch_size * width)
