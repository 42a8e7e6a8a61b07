"""The closed vocabulary of the world.

Words are short and few, so that nearly every one becomes a single token of a small BPE vocabulary: a model of this
size then learns facts about words instead of spelling.
"""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "cow", "pig", "fox", "bear", "lion", "wolf", "goat", "horse"),
    "fruit": ("apple", "pear", "plum", "fig", "lemon", "mango", "peach", "grape", "melon", "cherry"),
    "color": ("red", "blue", "green", "pink", "white", "black", "brown", "gray", "yellow", "purple"),
    "tool": ("hammer", "saw", "drill", "axe", "rake", "wrench", "spade", "ladder", "brush", "shovel"),
    "vehicle": ("car", "bus", "train", "truck", "bike", "boat", "ship", "plane", "taxi", "tram"),
    "drink": ("tea", "coffee", "milk", "juice", "water", "wine", "beer", "soda", "cider", "cocoa"),
    "instrument": ("piano", "guitar", "violin", "drum", "flute", "harp", "trumpet", "cello", "banjo", "tuba"),
    "garment": ("shirt", "coat", "hat", "sock", "shoe", "scarf", "glove", "dress", "skirt", "belt"),
    "metal": ("iron", "gold", "silver", "copper", "tin", "zinc", "nickel", "steel", "brass", "bronze"),
    "flower": ("rose", "tulip", "lily", "daisy", "orchid", "poppy", "iris", "lotus", "aster", "pansy"),
}
"""Category (singular) -> its ten members."""

CATEGORY_OF: dict[str, str] = {word: name for name, words in CATEGORIES.items() for word in words}
WORDS: tuple[str, ...] = tuple(CATEGORY_OF)

COUNTABLE: tuple[str, ...] = tuple(
    word
    for name in ("animal", "fruit", "tool", "vehicle", "instrument", "garment", "flower")
    for word in CATEGORIES[name]
    if word not in ("lotus", "iris")
)
"""The words that the plural family uses."""

_IRREGULAR_PLURALS = {"wolf": "wolves", "scarf": "scarves", "mango": "mangoes"}

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "new"),
    ("high", "low"),
    ("long", "short"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("rich", "poor"),
    ("full", "empty"),
    ("early", "late"),
    ("open", "closed"),
    ("strong", "weak"),
    ("dark", "light"),
    ("clean", "dirty"),
    ("loud", "quiet"),
)
OPPOSITE_OF: dict[str, str] = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}

PAST_OF: dict[str, str] = {
    "walks": "walked",
    "runs": "ran",
    "goes": "went",
    "drives": "drove",
    "rides": "rode",
    "comes": "came",
    "moves": "moved",
    "travels": "traveled",
    "flies": "flew",
    "returns": "returned",
}
"""Present -> past, verbs that go before "to <place>"."""

PLACES: tuple[str, ...] = ("park", "market", "school", "river", "beach", "station", "office", "farm")
NAMES: tuple[str, ...] = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Lucy", "Tom")
CITIES: tuple[str, ...] = ("Paris", "London", "Rome", "Berlin", "Madrid", "Tokyo", "Cairo", "Lima", "Oslo", "Delhi")
MAX_NUMBER = 50
NUMBERS: tuple[str, ...] = tuple(str(n) for n in range(MAX_NUMBER + 1))

CLAIMS: dict[str, tuple[str, ...]] = {
    "numbers": NUMBERS,
    "facts": (*CITIES, *NAMES, *NUMBERS),
    "verbs": (*PAST_OF, *PAST_OF.values()),
    "adjectives": tuple(OPPOSITE_OF),
    "yes or no": ("Yes", "No"),
    "words": WORDS,
}
"""The words that an answer in a sentence can claim, by kind of question."""


def plural(word: str) -> str:
    """The English plural of a lexicon word."""
    if word in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(noun: str) -> str:
    """`noun` with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
