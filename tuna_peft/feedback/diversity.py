"""Similarity of the responses to one prompt."""

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
    """A tokenizer for any script: stems of words in Latin letters and digits, single characters of all other scripts.

    rouge_score's own tokenizer drops all other scripts, so that two Chinese texts would never count as similar.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        tokens = re.findall(r"[a-z0-9]+|[^\W_]", text.lower())
        return [self._stem(token) if len(token) > 3 else token for token in tokens]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    return RougeScorer(["rougeL"], tokenizer=_Words())
