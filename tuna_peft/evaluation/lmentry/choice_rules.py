"""LMentry's rules for tasks with one right answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tuna_peft.evaluation.lmentry.patterns import (
    announced,
    bare,
    contains,
    has_word,
    is_exactly,
    is_only,
    letter,
    named,
    quantity,
    says,
    sentence,
    word,
    words_listed,
)

Metadata = dict[str, Any]
Rule = Callable[[str, Metadata], bool]

LESS, BIGGER = "(less|fewer)", "(bigger|larger)"
DOES_NOT = "(does not|doesn't)"


def associated_word(degree: str) -> Rule:
    """The word that is `most` or `least` associated with a category."""

    def rule(response: str, about: Metadata) -> bool:
        right, place = about["answer"], about["answer_index"]
        if not has_word(response, right):
            return False
        listed = words_listed([*about["distractors"][:place], right, *about["distractors"][place:]])
        options, given = "(words|options)", "(above|given|listed|following)"
        among = f"(of|from) ({listed}|the {options} {given}|the {given} {options})"
        related = f"{degree}( commonly)? (associated|related)"
        answer, category = word(right), word(about["category"])
        phrases = []
        for one, other in ((answer, category), (category, answer)):
            phrases += [
                f"the word {related} (to|with) {other} ({among} )?is {one}",
                f"{other} (is|are) {related} (to|with) {one}",
                f"{one} (is|are) the (word )?{related} (to|with) {other}",
                f"the word that relates to {other} the {degree} is {one}",
                f"{one} relates to {other} the {degree}",
            ]
        exact = [answer, f"{category} - {answer}"] if degree == "most" else [answer]
        return any(is_only(response, form) for form in exact) or contains(response, [*phrases, *announced(answer)])

    return rule


def any_words_from_category(response: str, about: Metadata) -> bool:
    return _yes_or_no(response, about["num_words"] > about["num_distractors"], [])


def all_words_from_category(response: str, about: Metadata) -> bool:
    wider = {
        "items of clothing": "(items of clothing|clothes|clothing)",
        "furniture": "(furniture|pieces of furniture)",
        "fruit": "(fruit|fruits)",
    }
    category = wider.get(about["category"], about["category"])
    every = "(all of these words|all of those words|all of the words|they all)( (listed|in the list))?"
    reasons = [
        f", the list contains only {category}",
        f", {every} (represent|are types of|refer to types of) {category}",
    ]
    return _yes_or_no(response, about["num_distractors"] == 0, reasons)


def _yes_or_no(response: str, yes: bool, reasons: list[str]) -> bool:
    right, wrong = ("yes", "no") if yes else ("no", "yes")
    if is_exactly(response, [wrong]):
        return False
    phrases = [rf"^{right}\b", *(right + reason for reason in reasons)]
    return says(response, right, phrases)


def first_alphabetically(response: str, about: Metadata) -> bool:
    if _is_one_other_word(response, about["answer"]):
        return False
    answer, other = word(about["answer"]), word(about["distractor"])
    phrases = [
        f"{answer} (comes|is) first",
        f"{other} (comes|is) (second|after)",
        f"{answer} (comes|is) before {other}",
    ]
    return is_only(response, f"{answer} does") or says(response, answer, phrases)


def compared_letters(more: str, less: str, longer: str, shorter: str) -> Rule:
    """The word with more (or less) letters; the arguments say how the right word and the other one are described."""

    def rule(response: str, about: Metadata) -> bool:
        right, wrong = about["answer"], about["distractor"]
        answer, other = word(right), word(wrong)
        apart = quantity(abs(len(right) - len(wrong)))
        wrong_claims = [
            other,
            f"{other} has {more} letters( than {answer})?",
            f"{other} has {apart} {more} letter(s)?( than {answer})?",
            f"the word that (has {more} letters|is {longer}) is {other}",
            f"{other} is the word that (has {more} letters|is {longer})",
            f"{other} is {longer}( than {answer})?( by {apart} letter(s)?)?",
            f"the {longer} word is {other}",
        ]
        if is_exactly(response, wrong_claims) or _wrong_difference(response, right, wrong, apart, more, longer):
            return False
        phrases = []
        for one, letters, length in ((answer, more, longer), (other, less, shorter)):
            phrases += [
                f"{one} has ({letters} letters|{apart} {letters} letter)",
                f"the word that (has {letters} letters|is {length}) is {one}",
                f"{one} is the word that (has {letters} letters|is {length})",
                f"{one} is {length}",
                f"the {length} word is {one}",
            ]
        return says(response, answer, phrases)

    return rule


def _wrong_difference(response: str, right: str, wrong: str, apart: str, more: str, longer: str) -> bool:
    """Whether the right word is named with a wrong difference in letters."""
    stated = r"(?P<number>\d+|one|two|three|four|five|six|seven|eight|nine|ten|zero|a single)"
    for form in (
        f"{bare(right)} has {stated} {more} letter",
        f"{bare(right)} is {longer}( than {bare(wrong)})? by {stated} letter",
    ):
        found = re.match(form, response)
        if found and not re.match(apart, found.group("number")):
            return True
    return False


def compared_numbers(bigger: str, smaller: str) -> Rule:
    """The bigger (or smaller) number; the arguments say how the right number and the other one are described."""

    def rule(response: str, about: Metadata) -> bool:
        said = set(re.findall(r"\b[a-z\d]+\b", response))
        if len(said) == 1 and said != {str(about["answer"])}:
            return False
        answer, other = (named("number", quantity(about[key])) for key in ("answer", "distractor"))
        phrases = []
        for one, how in ((answer, bigger), (other, smaller)):
            phrases += [f"{one} is ({how}|the {how} number)", f"the {how} number is {one}"]
        return says(response, answer, phrases)

    return rule


def rhyming_word(response: str, about: Metadata) -> bool:
    if _is_one_other_word(response, about["answer"]):
        return False
    answer, query, other = (word(about[key]) for key in ("answer", "query", "distractor"))
    a = "(a|the)"
    forms = []
    for one, two in ((query, answer), (answer, query)):
        forms += [
            f"{one} rhymes with {two}( and not with {other})?",
            f"{one} is {a} rhyme of {two}( and not of {other})?",
            f"{one} and {two} (rhyme|are rhymes|are words that rhyme)",
            f"{a} rhyme of {one} is {two}( and not {other})?",
            f"{a} word (rhyming with|that rhymes with) {one} is {two}",
            f"{one} and {two}( both)? rhyme( with each other)?, (while|but|and) {other} {DOES_NOT} rhyme with "
            "either( word)?",
        ]
    forms += [
        rf"{other} {DOES_NOT} rhyme with {query}(\s+{answer} (rhymes|does rhyme) with {query})?",
        rf"{query} {DOES_NOT} rhyme with {other}(\s+{query} (rhymes|does rhyme) with {answer})?",
        rf"{answer} rhymes with {query}\s+{other} {DOES_NOT} rhyme with {query}",
    ]
    return any(is_only(response, form) for form in (answer, *forms))


def homophones(response: str, about: Metadata) -> bool:
    if not has_word(response, about["answer"]):
        return False
    answer, query, other = (word(about[key]) for key in ("answer", "query", "distractor"))
    but, like = r"(\.,)? (but|and)", "(like|similar to)"
    forms = []
    for one, two in ((query, answer), (answer, query)):
        forms += [
            f"{one} sounds {like} {two}({but} not {like} {other}|{but} {other} does not)?",
            f"{one} and {two} sound alike",
            f"{one} sounds more {like} {two}( than( like)? {other}( does)?)?",
            f"{one} sounds most {like} {two}",
            f"{one} is a homophone of {two}",
            f"{one} and {two} are homophones( of each other)?",
            f"the homophone of {one} is {two}",
        ]
    return any(is_only(response, form) for form in (answer, *forms))


def neighbouring_word(side: str) -> Rule:
    """The word `after` or `before` another one in a sentence."""

    def rule(response: str, about: Metadata) -> bool:
        right, asked, whole = (about[key].lower() for key in ("answer", "query", "sentence"))
        if not has_word(response, right) or re.sub(r"[^\w ]+", "", response) == whole:
            return False
        answer, query = word(right), word(asked)
        after, before = (f"(immediately |right )?{where}" for where in ("after", "before"))
        first, second = (query, answer) if side == "after" else (answer, query)  # in the order of the sentence
        there = f"( in {sentence(whole)})?"
        phrases = [
            f"{second} (comes|is the word that comes) {after} {first}",
            f"the word that comes {after} {first}{there} is {second}",
            f"{first} (comes|is the word that comes) {before} {second}",
            f"the word that comes {before} {second}{there} is {first}",
            f"{first} is (succeeded|followed) by {second}",
            f"{second} (immediately )?follows {first}",
            f"the word that (immediately )?follows {first} is {second}",
            f"{second} (is the word that )?(immediately )?succeeds {first}",
            f"the word that (immediately )?succeeds {first} is {second}",
        ]
        if side == "before":  # the published rules for `after` do not know this verb
            phrases += [
                f"{first} (is the word that )?(immediately )?precedes {second}",
                f"the word that (immediately )?precedes {second} is {first}",
            ]
        return says(response, answer, phrases)

    return rule


def outer_word(place: str, verb: str) -> Rule:
    """The `first` or `last` word of a sentence."""

    def rule(response: str, about: Metadata) -> bool:
        right = about["answer"].lower()
        if not has_word(response, right):
            return False
        answer, whole = word(right), sentence(about["sentence"].lower())
        phrases = [
            f"the {place} word ((of|in) {whole} )?is {answer}",
            f"{answer} is the {place} word",
            f"{whole} {verb} with {answer}",
            rf"first word\w+{answer}",  # of both tasks in the published rules
        ]
        return says(response, answer, phrases)

    return rule


def outer_letter(place: str, verb: str, other_name: str) -> Rule:
    """The `first` or `last` letter of a word."""

    def rule(response: str, about: Metadata) -> bool:
        if not has_word(response, about["answer"]):
            return False
        answer, whole = letter(about["answer"]), word(about["word"])
        phrases = [
            f"the {place} letter ((of|in) {whole} )?is {answer}",
            f"{answer} is the ({place}|{other_name}) letter (of|in) {whole}",
            f"{whole} {verb} with {answer}",
            f"the letter that {whole} {verb} with is {answer}",
            f"{whole}: {answer}",
            f"{place} letter: {answer}",
        ]
        return says(response, answer, phrases)

    return rule


def _is_one_other_word(response: str, answer: str) -> bool:
    said = re.findall(r"\b[a-z]+\b", response)
    return len(said) == 1 and said[0] != answer
