"""Families whose answer is one short sentence: count, compare, extract, add, decide, rewrite.

Each function draws one task, `(rng, phrasing) -> (instruction, input, output, answer)`, where `phrasing` is
the index of a wording.
"""

from __future__ import annotations

from random import Random
from typing import Any

from tuna_peft.assets import pico_lexicon

Draft = tuple[str, str, str, dict[str, Any]]


def _sentence(
    value: str, output: str, wrong: list[str], claims: str, claim: str = "last", terse: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Output and answer; `terse` is the bare reply, the value itself unless given."""
    answer = {"kind": "sentence", "value": value, "terse": terse or value, "wrong": wrong}
    return output, answer | {"claims": claims, "claim": claim}


def _near(rng: Random, number: int, low: int = 0) -> list[int]:
    """Numbers off by one or two."""
    return [n for n in rng.sample((number - 1, number + 1, number - 2, number + 2), 4) if n >= low][:3]


def count_items(rng: Random, phrasing: int) -> Draft:
    """How many members of a category a list has."""
    wanted, other = rng.sample(list(pico_lexicon.CATEGORIES), 2)
    name, count = pico_lexicon.plural(wanted), rng.choice((2, 3, 4))
    instruction = (
        f"How many {name} are in the list?",
        f"Count the {name}.",
        f"How many of these are {name}?",
        f"Count the {name} in the list.",
        f"Tell me how many {name} there are.",
        f"Please count the {name}.",
    )[phrasing]
    given = rng.sample(pico_lexicon.CATEGORIES[wanted], count) + rng.sample(
        pico_lexicon.CATEGORIES[other], rng.choice((1, 2))
    )
    rng.shuffle(given)
    wrong = [f"There are {n} {name}." for n in _near(rng, count, 1)]
    output, answer = _sentence(str(count), f"There are {count} {name}.", wrong, "numbers")
    return instruction, ", ".join(given), output, answer


def compare_numbers(rng: Random, phrasing: int) -> Draft:
    """The larger or smaller of two numbers."""
    a, b = rng.sample(range(1, pico_lexicon.MAX_NUMBER + 1), 2)
    instruction = (
        f"Which number is larger, {a} or {b}?",
        f"Which number is smaller, {a} or {b}?",
        f"What is the larger number: {a} or {b}?",
        f"What is the smaller number: {a} or {b}?",
        f"Tell me the larger of {a} and {b}.",
        f"Tell me the smaller of {a} and {b}.",
    )[phrasing]
    low, high = sorted((a, b))
    right, left, word = (low, high, "smaller") if phrasing % 2 else (high, low, "larger")
    wrong = [f"{left} is {word} than {right}."]
    output, answer = _sentence(str(right), f"{right} is {word} than {left}.", wrong, "numbers", "first")
    return instruction, "", output, answer


def arithmetic(rng: Random, phrasing: int) -> Draft:
    """A sum or a difference of two small numbers."""
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if phrasing % 2:
        a, b = max(a, b), min(a, b)
    value, word = (a - b, "minus") if phrasing % 2 else (a + b, "plus")
    instruction = (
        f"What is {a} plus {b}?",
        f"What is {a} minus {b}?",
        f"Add {a} and {b}.",
        f"Take {b} from {a}.",
        f"How much is {a} plus {b}?",
        f"How much is {a} minus {b}?",
    )[phrasing]
    wrong = [f"{a} {word} {b} is {n}." for n in _near(rng, value)]
    output, answer = _sentence(str(value), f"{a} {word} {b} is {value}.", wrong, "numbers")
    return instruction, "", output, answer


def extract(rng: Random, phrasing: int) -> Draft:
    """The person, the city or the number in a sentence."""
    name, city = rng.choice(pico_lexicon.NAMES), rng.choice(pico_lexicon.CITIES)
    number, word = rng.randint(2, 20), pico_lexicon.plural(rng.choice(pico_lexicon.COUNTABLE))
    sentence = rng.choice(
        (
            f"{name} from {city} has {number} {word}.",
            f"In {city}, {name} bought {number} {word}.",
            f"{name} sold {number} {word} in {city}.",
        )
    )
    instruction = (
        "Which city is in the sentence?",
        "Who is in the sentence?",
        "Which number is in the sentence?",
        "Find the city in the text.",
        "Find the person in the text.",
        "Find the number in the text.",
    )[phrasing]
    kind, value = (("city", city), ("person", name), ("number", str(number)))[phrasing % 3]
    wrong = [f"The {kind} is {other}." for other in (city, name, str(number)) if other != value]
    output, answer = _sentence(value, f"The {kind} is {value}.", wrong, "facts")
    return instruction, sentence, output, answer


def past_tense(rng: Random, phrasing: int) -> Draft:
    """A sentence moved to the past."""
    instruction = (
        "Rewrite the sentence in the past tense.",
        "Put the sentence in the past tense.",
        "Change the sentence to the past tense.",
        "Write this sentence in the past.",
        "Turn this into the past tense.",
        "Please use the past tense.",
    )[phrasing]
    name, verb, place = (
        rng.choice(pico_lexicon.NAMES),
        rng.choice(list(pico_lexicon.PAST_OF)),
        rng.choice(pico_lexicon.PLACES),
    )
    past = pico_lexicon.PAST_OF[verb]
    others = rng.sample([p for p in pico_lexicon.PAST_OF.values() if p != past], 2)
    wrong = [f"{name} {other} to the {place}." for other in others]
    output, answer = _sentence(past, f"{name} {past} to the {place}.", wrong, "verbs", "first", f"{name} {past}")
    return instruction, f"{name} {verb} to the {place}.", output, answer


def membership(rng: Random, phrasing: int) -> Draft:
    """Whether a word belongs to a category."""
    word = rng.choice(pico_lexicon.WORDS)
    true, yes = pico_lexicon.CATEGORY_OF[word], rng.random() < 0.5
    asked = true if yes else rng.choice([name for name in pico_lexicon.CATEGORIES if name != true])
    noun = pico_lexicon.with_article(asked)
    instruction = (
        f"Is {word} {noun}?",
        f"Would you call {word} {noun}?",
        f"Tell me if {word} is {noun}.",
        f"True or false: {word} is {noun}?",
        f"Does {word} count as {noun}?",
        f"Please say if {word} is {noun}.",
    )[phrasing]
    affirm, deny = f"Yes, {word} is {noun}.", f"No, {word} is not {noun}."
    right, wrong = (affirm, deny) if yes else (deny, affirm)
    output, answer = _sentence("Yes" if yes else "No", right, [wrong], "yes or no", "first")
    return instruction, "", output, answer


def position(rng: Random, phrasing: int) -> Draft:
    """The first or the last item of a list."""
    which = ("first", "last")[phrasing % 2]
    instruction = (
        "What is the first item?",
        "What is the last item?",
        "Which item is first in the list?",
        "Which item is last in the list?",
        "Give me the first item of the list.",
        "Give me the last item of the list.",
    )[phrasing]
    given = rng.sample(pico_lexicon.WORDS, rng.choice((3, 4)))
    value = given[0] if which == "first" else given[-1]
    wrong = [f"The {which} item is {word}." for word in given if word != value]
    output, answer = _sentence(value, f"The {which} item is {value}.", wrong, "words")
    return instruction, ", ".join(given), output, answer


def odd_one_out(rng: Random, phrasing: int) -> Draft:
    """The one item of another category."""
    instruction = (
        "Which word does not belong?",
        "Find the odd one out.",
        "Which item is the odd one out?",
        "Which word does not fit?",
        "Tell me which word does not belong.",
        "Please find the odd one out.",
    )[phrasing]
    main, other = rng.sample(list(pico_lexicon.CATEGORIES), 2)
    value = rng.choice(pico_lexicon.CATEGORIES[other])
    given = [*rng.sample(pico_lexicon.CATEGORIES[main], 3), value]
    rng.shuffle(given)
    wrong = [f"The odd one out is {word}." for word in given if word != value]
    output, answer = _sentence(value, f"The odd one out is {value}.", wrong, "words")
    return instruction, ", ".join(given), output, answer


def opposite(rng: Random, phrasing: int) -> Draft:
    """The antonym of an adjective."""
    word = rng.choice(list(pico_lexicon.OPPOSITE_OF))
    value = pico_lexicon.OPPOSITE_OF[word]
    instruction = (
        f"What is the opposite of {word}?",
        f"Give me the opposite of {word}.",
        f"Which word is the opposite of {word}?",
        f"Name the opposite of {word}.",
        f"Tell me the opposite of {word}.",
        f"Please give the opposite of {word}.",
    )[phrasing]
    others = rng.sample([other for other in pico_lexicon.OPPOSITE_OF if other not in (word, value)], 2)
    wrong = [f"The opposite of {word} is {other}." for other in others]
    output, answer = _sentence(value, f"The opposite of {word} is {value}.", wrong, "adjectives")
    return instruction, "", output, answer
