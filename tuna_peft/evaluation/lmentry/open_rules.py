"""LMentry's rules for tasks with many right answers: sentences and words that contain, start or end with something."""

from __future__ import annotations

import re
import string
from typing import Any

from tuna_peft.evaluation.lmentry.patterns import (
    NOT_WORD,
    announced,
    contains,
    has_word,
    is_only,
    letter,
    says,
    word,
)

Metadata = dict[str, Any]
VALID_WORD = r"(a|i|\w\w+)"
DOES_NOT = "(does not|doesn't)"


def sentence_containing(response: str, about: Metadata) -> bool:
    wanted = rf"\b{about['word'].lower()}\b"
    return re.search(f"({wanted}.+)|(.+{wanted})", response) is not None


def sentence_not_containing(response: str, about: Metadata) -> bool:
    return not has_word(response, about["word"].lower()) and len(re.findall(r"\b[a-z]+\b", response)) > 1


def word_containing(response: str, about: Metadata) -> bool:
    wanted = about["letter"]
    # A lone letter is a word only if it is a or i; the last form is that of "e-mail".
    forms = rf"\w*{wanted}\w*" if wanted in "ai" else rf"((\w+{wanted}\w*)|(\w*{wanted}\w+)|({wanted}-\w+))"
    said = word(forms)
    phrase = rf"{said} (is a word (that|which) )?(contains|uses|has) {letter(wanted)}"
    return says(response, said, [phrase])


def word_not_containing(response: str, about: Metadata) -> bool:
    unwanted, that = about["letter"], "(that|which)"
    asked = re.sub(" +", " ", about["input"].strip().lower()).replace(f'"{unwanted}"', r'"\w"')
    if re.match(f"{asked}$", response) or (not re.search(r"\W", response) and unwanted in response):
        return False
    alone = "".join(f"|({vowel})" for vowel in "ai" if vowel != unwanted)
    said = word(rf"((\b[{string.ascii_lowercase.replace(unwanted, '')}]{{2,}}\b){alone})")
    phrases = [
        rf"{said} (is a word {that} )?{DOES_NOT} (contain|use|have) {letter(unwanted)}",
        rf"a word {that} {DOES_NOT} (contain|use|have) {letter(unwanted)} is {said}",
        rf"a word not (containing|using|having) {letter(unwanted)} is {said}",
        rf"{said} is a word without {letter(unwanted)}",
    ]
    return is_only(response, said, repeated=False) or contains(response, phrases)


def starts_with_word(response: str, about: Metadata) -> bool:
    wanted = about["word"].lower()
    if not has_word(response, wanted):
        return False
    first = word(wanted)
    # At least one more word must follow.
    said = f"{NOT_WORD}*{first}{NOT_WORD}+{VALID_WORD}.*"
    how = f"(that starts with|starting with|whose first word is) {first}"
    opening = f"(the sentence( is)?|(a|one) sentence {how}( is)?)"
    closing = f"(starts with {first}|is a sentence {how})"
    return is_only(response, said) or contains(response, [f"{opening}({'|'.join([said, *announced(said)])}){closing}"])


def ends_with_word(response: str, about: Metadata) -> bool:
    wanted = about["word"].lower()
    if not has_word(response, wanted):
        return False
    last = word(wanted)
    said = f".*{VALID_WORD}{NOT_WORD}+{last}{NOT_WORD}*"
    how = f"(that ends with {last} |ending with {last}|whose (last|final) word is {last})"
    opening = f"(the sentence( is)?|(a|one) sentence {how}( is)?)"
    return is_only(response, said) or contains(response, [f"{opening}({'|'.join([said, *announced(said)])})$"])


def starts_with_letter(response: str, about: Metadata) -> bool:
    first = about["letter"]
    if all(part[0] != first for part in re.findall(r"\b[a-z]+\b", response)):
        return False
    said = word(f"{first}-?" + (r"\w*" if first in "ai" else r"\w+"))  # "-" for e-mail and x-ray
    starting = "(starting|beginning)"
    phrases = [
        *_letter_phrases(said, first, "(starts|begins)", starting, "starting"),
        f"{said} is (a|one) word whose first letter is {letter(first)}",
        f"{letter(first)} is for {said}",
        f"how about {said}",
    ]
    return says(response, said, phrases)


def ends_with_letter(response: str, about: Metadata) -> bool:
    last = about["letter"]
    if all(part[-1] != last for part in re.findall(r"\b[a-z]+\b", response)):
        return False
    said = word((r"\w*" if last in "ai" else r"\w+") + last)
    # The published rules run two phrases into one here.
    joined = f"{said} is (a|one) word whose last letter is {letter(last)}how about {said}"
    phrases = [*_letter_phrases(said, last, "ends", "ending", "ending"), joined]
    return says(response, said, phrases)


def _letter_phrases(said: str, wanted: str, ends: str, ending: str, after_a_word: str) -> list[str]:
    return [
        f"(a|one) possible( such)? (word|answer) is {said}",
        f"{said} is (a|one) possible( such)? (word|answer)",
        f"{said} (is (a|one) word that )?{ends} with {letter(wanted)}",
        f"{said} is (a|one) word {ending} with {letter(wanted)}",
        f"a word {after_a_word} with {letter(wanted)} is {said}",
        f"may i suggest {said}",
    ]
