"""How alike the responses of a prompt are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Any


def similarities(texts: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of every pair, between 0 and 1, in the order of `itertools.combinations`."""
    return [1.0 if a == b else _scorer().score(a, b)["rougeL"].fmeasure for a, b in combinations(texts, 2)]


class _Words:
    """Tokens in any script: words of Latin letters and digits by their stem, single characters of all others.

    The library's own tokenizer drops every other script, so that two texts in Chinese would never be alike.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        tokens = re.findall(r"[a-z0-9]+|[^\W_]", text.lower())
        return [self._stem(token) if len(token) > 3 else token for token in tokens]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk: seconds, not for `--help`

    return RougeScorer(["rougeL"], tokenizer=_Words())
