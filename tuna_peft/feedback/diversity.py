"""Similarity of the responses to one prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations


def similarities(texts: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of every pair, between 0 and 1, in the order of `itertools.combinations`.

    The numbers are those of the package rouge_score with these words, which fills a table for each pair: that took
    longer than several GPUs need to sample.
    """
    words = [_words(text) for text in texts]
    pairs = combinations(range(len(texts)), 2)
    return [1.0 if texts[i] == texts[j] else _rouge_l(words[i], words[j]) for i, j in pairs]


def _words(text: str) -> list[str]:
    """Stems of words in Latin letters and digits, single characters of all other scripts.

    rouge_score's own tokenizer drops all other scripts, so that two Chinese texts would never count as similar.
    """
    tokens = re.findall(r"[a-z0-9]+|[^\W_]", text.lower())
    return [_stemmer()(token) if len(token) > 3 else token for token in tokens]


def _rouge_l(target: Sequence[str], prediction: Sequence[str]) -> float:
    common = _common_subsequence(target, prediction)
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(target)
    return 2 * precision * recall / (precision + recall)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, with a column of the table in the bits of an integer.

    Hyyrö, "Bit-parallel LCS-length computation revisited" (AWOCA 2004): bit i is 0 where the length grows at one[i].
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = column = (1 << len(one)) - 1
    for word in other:
        matches = column & places.get(word, 0)
        column = (column + matches | column - matches) & every
    return len(one) - column.bit_count()


@cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # takes seconds

    return cache(PorterStemmer().stem)
