"""Building blocks of LMentry's rules: ways to name a word, a number or a sentence, and two ways to look for an answer.

Everything is matched against a response in lower case, see `normalise`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_MARKS = r"[\"'.,]*"
NOT_WORD = "[^a-z0-9_]"

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
    "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def normalise(response: str, *, first_sentence: bool = False) -> str:
    """Lower case, single spaces, no underscores; `first_sentence` cuts at the first line break or full stop."""
    text = re.sub(" +", " ", response.strip().lower()).replace("_", " ")
    return text.split("\n")[0].split(".")[0] if first_sentence else text


def named(kind: str, pattern: str) -> str:
    """`pattern` as a whole word, maybe in quotes, maybe introduced as `the <kind>`."""
    return rf"(the {kind} )?{bare(pattern)}"


def bare(pattern: str) -> str:
    """As `named`, without the introduction."""
    return rf"{_MARKS}\b{pattern}\b{_MARKS}"


def word(pattern: str) -> str:
    """A word that may be called `the word ...`."""
    return named("word", pattern)


def letter(pattern: str) -> str:
    """A letter that may be called `the letter ...`."""
    return named("letter", pattern)


def sentence(text: str) -> str:
    """A sentence that may be in quotes, or only be called `the sentence`."""
    return f"((the sentence )?{_MARKS}{text}{_MARKS}|the sentence)"


def quantity(number: int) -> str:
    """A number below 1,000 in digits or in words."""
    words = in_words(number)
    return rf"(\b{number}\b|{words}|{words.replace('-', ' ')})"


def in_words(number: int) -> str:
    """A number below 1,000 in British English: `seven hundred and sixty-two`."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


def words_listed(words: Iterable[str]) -> str:
    """Words one after the other, whatever stands between them."""
    *first, last = words
    joined = "".join(f"{word}{NOT_WORD}+" for word in first)
    return f"(the words )?{NOT_WORD}*{joined}(and{NOT_WORD}+)?{last}{NOT_WORD}+{NOT_WORD}*"


def is_only(response: str, pattern: str, *, repeated: bool = True) -> bool:
    """Whether the response is `pattern` and nothing else; with `repeated`, each of its words may be one."""
    if not re.search(r"[^\W_]", response):
        return False
    if re.match(rf"{pattern}\.?$", response, re.IGNORECASE):
        return True
    return repeated and all(re.match(f"{pattern}$", part) for part in re.findall(r"\b[a-z\d]+\b", response))


def contains(response: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns is somewhere in the response."""
    return any(re.search(pattern.lower(), response) for pattern in patterns)


def is_exactly(response: str, patterns: Iterable[str]) -> bool:
    """Whether the response is one of the patterns, maybe with a full stop."""
    return any(re.match(rf"{pattern.lower()}\.?$", response) for pattern in patterns)


def has_word(response: str, text: str) -> bool:
    """Whether `text` stands in the response as a whole word."""
    return re.search(rf"\b{text}\b", response) is not None


def announced(target: str) -> list[str]:
    """The ways to say that `target` is the answer, of all tasks."""
    return [f"{target} is the answer", f"the (correct )?answer is {target}", f"answer: {target}"]


def says(response: str, answer: str, phrases: Iterable[str]) -> bool:
    """Whether the response is `answer` alone, has one of the `phrases` in it, or announces `answer`."""
    return is_only(response, answer) or contains(response, [*phrases, *announced(answer)])
