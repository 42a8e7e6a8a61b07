"""Pre-training text: instructions answered in mixed styles, and plain statements of the same knowledge."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from pico_world import families, mixtures, styles
from pico_world.template import render_prompt
from tuna_peft.assets import pico_lexicon

_PLAIN_SHARE = 0.1


class Document(NamedTuple):
    """A text in two parts; the head is empty for plain text."""

    head: str
    body: str


def stream(seed: int) -> Iterator[Document]:
    """Endless documents, the same for the same seed; no held-out prompt among them."""
    rng = Random(seed)
    while True:
        if rng.random() < _PLAIN_SHARE:
            yield Document("", plain_text(rng))
        else:
            yield answered_instruction(rng)


def answered_instruction(rng: Random) -> Document:
    """A prompt and a response, in a style that depends on the wording of the prompt."""
    task = families.draw(rng, list(families.FAMILIES), held_out=False)
    style = mixtures.pick(mixtures.pretraining(task["phrasing"]), rng)
    return Document(render_prompt(task["instruction"], task["input"]), styles.respond(task, style, rng))


def plain_text(rng: Random) -> str:
    """A few statements about one subject."""
    write = rng.choice((_about_category, _about_order, _about_numbers, _about_opposites, _about_travel))
    return write(rng)


def _about_category(rng: Random) -> str:
    name = rng.choice(list(pico_lexicon.CATEGORIES))
    words = rng.sample(pico_lexicon.CATEGORIES[name], 4)
    noun = pico_lexicon.with_article(name)
    return f"{', '.join(words)} are {pico_lexicon.plural(name)}. " + " ".join(
        f"{word} is {noun}." for word in words[:2]
    )


def _about_order(rng: Random) -> str:
    words = sorted(rng.sample(pico_lexicon.WORDS, 6))
    return f"In alphabetical order: {', '.join(words)}."


def _about_numbers(rng: Random) -> str:
    numbers = sorted(rng.sample(range(pico_lexicon.MAX_NUMBER + 1), 6))
    count, a, b = ", ".join(map(str, numbers)), rng.randint(1, 20), rng.randint(1, 20)
    return f"From small to large: {count}. {a} plus {b} is {a + b}. {a + b} minus {b} is {a}."


def _about_opposites(rng: Random) -> str:
    pairs = rng.sample(pico_lexicon.OPPOSITES, 3)
    return " ".join(f"The opposite of {a} is {b}." for a, b in (pair[:: rng.choice((1, -1))] for pair in pairs))


def _about_travel(rng: Random) -> str:
    name, place = rng.choice(pico_lexicon.NAMES), rng.choice(pico_lexicon.PLACES)
    present, past = rng.choice(list(pico_lexicon.PAST_OF.items()))
    return f"Today {name} {present} to the {place}. In the past {name} {past} to the {place}."
