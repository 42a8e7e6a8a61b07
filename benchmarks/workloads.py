"""The data of the benchmarks: groups of a prompt and its responses, made of random tokens."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

RESPONSES = 5
MEAN_LENGTH = 200
VARIATION = 0.6  # coefficient of variation of varied lengths
SHORTEST, LONGEST = 16, 512

Group = dict[str, Any]  # as `tuna_peft.data.tokenize.encode_ranked` makes them


@dataclass(frozen=True)
class Workload:
    """A prompt of `prompt` tokens with responses of `mean` tokens, of varied or equal lengths."""

    name: str
    prompt: int
    varied: bool = False
    responses: int = RESPONSES
    mean: int = MEAN_LENGTH

    def lengths(self, rng: random.Random) -> list[int]:
        """Response lengths: all `mean`, or log-normal around it, clipped to 16..512."""
        if not self.varied:
            return [self.mean] * self.responses
        sigma = math.sqrt(math.log(1 + VARIATION**2))
        mu = math.log(self.mean) - sigma**2 / 2
        return [min(max(round(rng.lognormvariate(mu, sigma)), SHORTEST), LONGEST) for _ in range(self.responses)]

    def groups(self, count: int, vocabulary: int, seed: int = 0) -> list[Group]:
        """`count` groups of random tokens, best response first; the same for a seed."""
        rng = random.Random(f"{self.name}-{seed}")

        def tokens(length: int) -> list[int]:
            return [rng.randrange(3, vocabulary) for _ in range(length)]

        return [
            {
                "prompt_ids": tokens(self.prompt),
                "completions_ids": [tokens(length) for length in self.lengths(rng)],
                "completion_skips": [0] * self.responses,
                "ranks": list(range(self.responses)),
            }
            for _ in range(count)
        ]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short", 100),
        Workload("short-varied", 100, varied=True),
        Workload("long", 400),
        Workload("long-varied", 400, varied=True),
    )
}


def response_tokens(groups: list[Group]) -> int:
    """Number of tokens with a loss."""
    return sum(len(response) for group in groups for response in group["completions_ids"])
