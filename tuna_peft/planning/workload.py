"""Lengths of data in tokens, and the largest forward passes that they make: memory and time follow from these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tuna_peft.limits import LONG_ROW, PAD_TO

# Assumed for data that is not downloaded yet: the lengths of Alpaca's prompts and of chat models' answers to them.
ASSUMED_PROMPT, ASSUMED_RESPONSE, ASSUMED_RESPONSES = 100, 200, 4
ASSUMED_ROWS, ASSUMED_HELD_OUT = 10_000, 500


@dataclass(frozen=True)
class Row:
    """Tokens of one prompt and of its responses.

    Tokens that responses share beyond the prompt are counted for each of them, though training computes them once: an
    upper bound.
    """

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the packed sequence."""
        return self.prompt + sum(self.responses)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest response."""
        return self.prompt + max(self.responses)


@dataclass(frozen=True)
class Workload:
    """The lengths of a data set.

    Attributes:
        rows: A sample of its examples that includes the longest.
        total: Number of examples in the data set.
        source: Where the lengths come from, in words.
    """

    rows: tuple[Row, ...]
    total: int
    source: str

    @classmethod
    def assumed(cls, responses: int, max_length: int | None, total: int, how: str = "") -> Workload:
        """Assumed lengths for data that is not on this machine.

        Args:
            responses: Responses to each prompt; 0 for prompts alone.
            max_length: Maximum tokens of a prompt with a response; None for no limit.
            total: Number of prompts.
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
        """Prompts alone: one in a hundred has the length `longest`, all others `typical`."""
        return cls((*(Row(typical, (0,)),) * 99, Row(longest, (0,))), total, source)

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of a prompt."""
        return sum(row.prompt for row in self.rows) / len(self.rows)

    @property
    def tokens(self) -> float:
        """Mean tokens of a packed sequence."""
        return sum(row.tokens for row in self.rows) / len(self.rows)

    @property
    def response_tokens(self) -> float:
        """Mean tokens of all responses of an example: those with a loss."""
        return sum(sum(row.responses) for row in self.rows) / len(self.rows)

    @property
    def attended(self) -> float:
        """Mean query-key pairs that attention computes in a packed sequence. Causal masking saves none here."""
        return sum(_attended(row) for row in self.rows) / len(self.rows)


def _attended(row: Row) -> float:
    if row.tokens < LONG_ROW:
        return row.tokens**2
    return row.prompt**2 + sum(length * (row.prompt + length) for length in row.responses)


@dataclass(frozen=True)
class ForwardPass:
    """The sizes of one forward pass.

    Attributes:
        rows: Sequences in the batch.
        width: Tokens of each, padding included.
        targets: Tokens with a loss.
        keys: Keys that the segments of packed sequences attend to, summed: the prompt for itself, prompt and response
            for each response. None without packing.
    """

    rows: int
    width: int
    targets: int
    keys: int | None = None

    @property
    def positions(self) -> int:
        """Tokens that are computed, padding included."""
        return self.rows * self.width

    @property
    def by_segment(self) -> bool:
        """Whether attention is computed segment by segment (`tuna_peft.models.forward.segments`), without a mask."""
        return self.keys is not None and self.width >= LONG_ROW


def packed_pass(rows: Sequence[Row], batch_size: int, max_tokens: int | None) -> ForwardPass:
    """The largest forward pass over packed sequences: `batch_size` of the longest, as far as `max_tokens` allows."""
    longest = max(rows, key=lambda row: row.tokens)
    width = longest.tokens + -longest.tokens % PAD_TO
    count = batch_size if max_tokens is None else max(min(batch_size, max_tokens // width), 1)
    if max_tokens is not None and count < batch_size:
        # A mix with shorter sequences may fill the budget better than copies of the longest: assume that it is full.
        width = max(width, min(max_tokens, batch_size * width) // count)
    keys = longest.prompt + sum(longest.prompt + response for response in longest.responses)
    return ForwardPass(count, width, count * sum(longest.responses), count * keys)


def padded_pass(rows: Iterable[Row], batch_size: int) -> ForwardPass:
    """The largest forward pass of supervised fine-tuning: `batch_size` prompts, each with one response."""
    longest = max(rows, key=lambda row: row.longest)
    width = longest.longest + -longest.longest % PAD_TO
    return ForwardPass(batch_size, width, batch_size * width)
