"""LMentry's scorers by task: is a response right, by the rules that the benchmark published with its code?

The published rules give a score and how sure they are of it; accuracy counts the score alone, so only that is made
here. What they get wrong by accident is kept where it can matter: a score is to mean what it means elsewhere.
"""

from __future__ import annotations

from tuna_peft.evaluation.lmentry.choice_rules import (
    BIGGER,
    LESS,
    Rule,
    all_words_from_category,
    any_words_from_category,
    associated_word,
    compared_letters,
    compared_numbers,
    first_alphabetically,
    homophones,
    neighbouring_word,
    outer_letter,
    outer_word,
    rhyming_word,
)
from tuna_peft.evaluation.lmentry.open_rules import (
    ends_with_letter,
    ends_with_word,
    sentence_containing,
    sentence_not_containing,
    starts_with_letter,
    starts_with_word,
    word_containing,
    word_not_containing,
)

RULES: dict[str, Rule] = {
    "sentence_containing": sentence_containing,
    "sentence_not_containing": sentence_not_containing,
    "word_containing": word_containing,
    "word_not_containing": word_not_containing,
    "most_associated_word": associated_word("most"),
    "least_associated_word": associated_word("least"),
    "any_words_from_category": any_words_from_category,
    "all_words_from_category": all_words_from_category,
    "first_alphabetically": first_alphabetically,
    "more_letters": compared_letters("more", LESS, "longer", "shorter"),
    "less_letters": compared_letters(LESS, "more", "shorter", "longer"),
    "bigger_number": compared_numbers(BIGGER, "smaller"),
    "smaller_number": compared_numbers("smaller", BIGGER),
    "rhyming_word": rhyming_word,
    "homophones": homophones,
    "word_after": neighbouring_word("after"),
    "word_before": neighbouring_word("before"),
    "starts_with_word": starts_with_word,
    "ends_with_word": ends_with_word,
    "starts_with_letter": starts_with_letter,
    "ends_with_letter": ends_with_letter,
    "first_word": outer_word("first", "begins"),
    "last_word": outer_word("last", "ends"),
    "first_letter": outer_letter("first", "(starts|begins)", "starting"),
    "last_letter": outer_letter("last", "ends", "final"),
}
"""The 25 core tasks, in the benchmark's order."""
