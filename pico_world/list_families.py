"""Families whose answer is a bare list: sort, filter, reverse, plural, name members.

Each function draws one task, `(rng, phrasing) -> (instruction, input, output, answer)`, where `phrasing` is
the index of a wording.
"""

from __future__ import annotations

from random import Random
from typing import Any

from tuna_peft.assets import pico_lexicon

Draft = tuple[str, str, str, dict[str, Any]]


def _list_draft(instruction: str, given: list[str], right: list[str], wrong: list[list[str]]) -> Draft:
    answer = {"kind": "list", "items": right, "wrong": [items for items in wrong if items not in (right, given)]}
    return instruction, ", ".join(given), ", ".join(right), answer


def _swaps(items: list[str]) -> list[list[str]]:
    """Every list with two neighbours exchanged."""
    return [items[:i] + [items[i + 1], items[i]] + items[i + 2 :] for i in range(len(items) - 1)]


def _unsorted(rng: Random, draw: list[str], order: list[str]) -> list[str]:
    """`draw` shuffled until it differs from its sorted `order`."""
    while draw == order:
        rng.shuffle(draw)
    return draw


def sort_words(rng: Random, phrasing: int) -> Draft:
    """Alphabetical order."""
    instruction = (
        "Sort the words in alphabetical order.",
        "Put these words in alphabetical order.",
        "Order the words from A to Z.",
        "Arrange the words alphabetically.",
        "Sort these words from A to Z.",
        "Please sort the words.",
    )[phrasing]
    given = rng.sample(pico_lexicon.WORDS, rng.choice((3, 3, 4)))
    right = sorted(given)
    return _list_draft(instruction, _unsorted(rng, given, right), right, _swaps(right))


def sort_numbers(rng: Random, phrasing: int) -> Draft:
    """Ascending or descending order."""
    instruction = (
        "Sort the numbers from small to large.",
        "Sort the numbers from large to small.",
        "Put the numbers in order, smallest first.",
        "Put the numbers in order, largest first.",
        "Arrange the numbers from small to large.",
        "Arrange the numbers from large to small.",
    )[phrasing]
    numbers = rng.sample(range(1, pico_lexicon.MAX_NUMBER + 1), rng.choice((3, 3, 4)))
    right = [str(n) for n in sorted(numbers, reverse=bool(phrasing % 2))]
    given = _unsorted(rng, [str(n) for n in numbers], right)
    return _list_draft(instruction, given, right, _swaps(right))


def filter_category(rng: Random, phrasing: int) -> Draft:
    """The members of one category, in the order given."""
    wanted, other, third = rng.sample(list(pico_lexicon.CATEGORIES), 3)
    name = pico_lexicon.plural(wanted)
    instruction = (
        f"List only the {name}.",
        f"Which of these are {name}?",
        f"Keep the {name} and drop the rest.",
        f"Find all {name} in the list.",
        f"Pick the {name} from the list.",
        f"Please list the {name}.",
    )[phrasing]
    right = rng.sample(pico_lexicon.CATEGORIES[wanted], rng.choice((2, 2, 3)))
    rest = [rng.choice(pico_lexicon.CATEGORIES[other]), rng.choice(pico_lexicon.CATEGORIES[third])]
    given = right + rest
    rng.shuffle(given)
    right = [word for word in given if word in right]
    wrong = [[word for word in given if word in right or word == extra] for extra in rest]
    wrong += [[rest[0] if word == right[i] else word for word in right] for i in range(len(right))]
    return _list_draft(instruction, given, right, wrong)


def reverse(rng: Random, phrasing: int) -> Draft:
    """The list from its end."""
    instruction = (
        "Reverse the order of the list.",
        "Write the list backwards.",
        "Reverse this list.",
        "Give the list in reverse order.",
        "Turn the list around.",
        "Please reverse the list.",
    )[phrasing]
    given = rng.sample(pico_lexicon.WORDS, rng.choice((3, 3, 4)))
    right = given[::-1]
    return _list_draft(instruction, given, right, _swaps(right))


def make_plural(rng: Random, phrasing: int) -> Draft:
    """Plural forms."""
    instruction = (
        "Write the words in the plural.",
        "Give the plural of each word.",
        "Change the words to the plural.",
        "Make these words plural.",
        "What are the plurals of these words?",
        "Please write the plurals.",
    )[phrasing]
    given = rng.sample(pico_lexicon.COUNTABLE, rng.choice((2, 3)))
    right = [pico_lexicon.plural(word) for word in given]
    wrong = [right[:i] + [given[i]] + right[i + 1 :] for i in range(len(given))]
    return _list_draft(instruction, given, right, wrong)


def name_members(rng: Random, phrasing: int) -> Draft:
    """Any members of a category."""
    category = rng.choice(list(pico_lexicon.CATEGORIES))
    count = rng.choice((2, 3, 4))
    number, name = {2: "two", 3: "three", 4: "four"}[count], pico_lexicon.plural(category)
    instruction = (
        f"Name {number} {name}.",
        f"List {number} {name}.",
        f"Give me {number} {name}.",
        f"Can you name {number} {name}?",
        f"Write down {number} {name}.",
        f"Please name {number} {name}.",
    )[phrasing]
    pool = list(pico_lexicon.CATEGORIES[category])
    outsiders = [word for word in pico_lexicon.WORDS if word not in pool]
    answer = {"kind": "members", "count": count, "pool": pool, "wrong": rng.sample(outsiders, 3)}
    return instruction, "", ", ".join(rng.sample(pool, count)), answer
