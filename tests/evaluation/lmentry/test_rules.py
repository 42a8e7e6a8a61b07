"""LMentry's rules on responses whose scores follow from the published scorers."""

import json
from pathlib import Path

import pytest

from tuna_peft.evaluation.lmentry.patterns import in_words, normalise
from tuna_peft.evaluation.lmentry.rules import RULES
from tuna_peft.evaluation.lmentry.scores import VARIANTS
from tuna_peft.evaluation.lmentry.task import rule_of

DATA = Path(__file__).parents[4] / "shared" / "data" / "lmentry"

LETTERS = {"answer": "banana", "distractor": "fig", "word1": "fig", "word2": "banana", "answer_index": 1}
NUMBERS = {"answer": 762, "distractor": 58, "n1": 58, "n2": 762}
RHYME = {"answer": "bake", "query": "lake", "distractor": "lack"}
SENTENCE = {"answer": "Dogs", "query": "bark", "sentence": "Dogs bark at night"}
CATEGORY = {"answer": "milk", "category": "cow", "distractors": ["sky", "ink"], "answer_index": 1}

CASES = {
    "sentence_containing": [({"word": "Cat"}, {"The cat sat.": 1, "cat": 0, "Concatenate this.": 0})],
    "sentence_not_containing": [
        ({"word": "cat"}, {"Dogs bark.": 1, "A cat sat.": 0, "Dogs": 0, "": 0, "Many cats sat.": 1})
    ],
    "word_containing": [
        ({"letter": "x"}, {"box": 1, "x": 0, "x-ray": 1, "dog": 0, "The word fox contains the letter x.": 1})
    ],
    "word_not_containing": [
        (
            {"letter": "c", "input": 'Write a word that doesn\'t contain the letter "c":'},
            {"dog": 1, "cat": 0, "a dog runs": 0, "Dog is a word without c.": 1,
             'Write a word that doesn\'t contain the letter "b":': 0},
        )
    ],
    "most_associated_word": [
        (CATEGORY, {"milk": 1, "sky": 0, "cow - milk": 1, "The word most associated with cow is milk.": 1,
                    "The word most associated with milk is cow": 1, "milk or ink": 0})
    ],
    "least_associated_word": [
        (CATEGORY, {"milk": 1, "cow - milk": 0, "Of the words above, milk relates to cow the least.": 1})
    ],
    "any_words_from_category": [
        ({"num_words": 5, "num_distractors": 4}, {"Yes.": 1, "no": 0, "Yes, they do": 1, "The answer is yes": 1}),
        ({"num_words": 5, "num_distractors": 5}, {"No": 1, "yes": 0, "Nothing": 0}),
    ],
    "all_words_from_category": [
        (
            {"num_distractors": 0, "category": "fruit"},
            {"yes": 1, "No.": 0, "Well yes, all of the words in the list are types of fruits": 1, "maybe": 0},
        )
    ],
    "first_alphabetically": [
        (LETTERS, {"banana": 1, "fig": 0, "banana comes before fig": 1, "fig is second": 1, "fig comes first": 0,
                   "Banana does.": 1})
    ],
    "more_letters": [
        (LETTERS, {"banana": 1, "fig": 0, "banana has 3 more letters than fig": 1, "banana has two more letters": 0,
                   "fig has fewer letters": 1, "fig is shorter than banana": 1, "fig has more letters": 0,
                   "The word that is longer is banana.": 1})
    ],
    "less_letters": [
        ({**LETTERS, "answer": "fig", "distractor": "banana"},
         {"fig": 1, "banana": 0, "fig has three fewer letters": 1, "banana is longer": 1,
          "fig is shorter by 9 letters": 0})
    ],
    "bigger_number": [
        (NUMBERS, {"762": 1, "58": 0, "Seven hundred and sixty-two": 1, "58 is smaller than 762": 1,
                   "The larger number is 58": 0, "762 is larger": 1, "762 is smaller": 0})
    ],
    "smaller_number": [
        ({**NUMBERS, "answer": 58, "distractor": 762},
         {"58": 1, "fifty eight": 1, "762 is the bigger number": 1, "762": 0})
    ],
    "rhyming_word": [
        (RHYME, {"bake": 1, "lack": 0, "lake rhymes with bake and not with lack.": 1, "bake and lake rhyme": 1,
                 "lake and bake are words": 0})
    ],
    "homophones": [
        ({"answer": "sea", "query": "see", "distractor": "look"},
         {"sea": 1, "look": 0, "see sounds like sea": 1, "see and sea are homophones of each other": 1,
          "the sea is": 0})
    ],
    "word_after": [
        ({**SENTENCE, "answer": "bark", "query": "Dogs"},
         {"bark": 1, "night": 0, "dogs is followed by bark": 1, "bark comes right after dogs": 1,
          "dogs bark at night": 0, "dogs precedes bark": 0})
    ],
    "word_before": [
        (SENTENCE, {"dogs": 1, "at": 0, "The word that comes before bark is dogs": 1, "dogs precedes bark": 1})
    ],
    "starts_with_word": [
        ({"word": "rain"}, {"Rain falls.": 1, "rain": 0, "It will rain.": 0,
                            "A sentence starting with rain is: rain is wet starts with rain": 1})
    ],
    "ends_with_word": [({"word": "rain"}, {"I like rain.": 1, "rain": 0, "Rain falls.": 0})],
    "starts_with_letter": [
        ({"letter": "e"}, {"egg": 1, "e-mail": 1, "dog": 0, "How about egg?": 1, "e": 0, "dogs eat": 0})
    ],
    "ends_with_letter": [({"letter": "t"}, {"cat": 1, "dog": 0, "A word ending with t is cat": 1, "cat dog": 0})],
    "first_word": [
        (SENTENCE, {"Dogs": 1, "bark": 0, "The first word of the sentence is Dogs.": 1,
                    "the sentence begins with dogs": 1})
    ],
    "last_word": [({**SENTENCE, "answer": "night"}, {"night": 1, "The last word is night": 1, "at": 0})],
    "first_letter": [
        ({"answer": "c", "word": "cat"}, {"c": 1, "The letter c": 1, "cat starts with c": 1, "cat: c": 1, "a": 0})
    ],
    "last_letter": [({"answer": "t", "word": "cat"}, {"t": 1, "t is the final letter of cat": 1, "c": 0})],
}  # fmt: skip


def test_every_core_task_has_its_cases():
    assert list(CASES) == list(RULES) and len(RULES) == 25 and len(VARIANTS) == 16


@pytest.mark.parametrize(
    ("task", "about", "response", "score"),
    [
        (task, about, response, score)
        for task, groups in CASES.items()
        for about, responses in groups
        for response, score in responses.items()
    ],
)
def test_rules(task, about, response, score):
    assert RULES[task](normalise(response), about) == bool(score)


def test_numbers_in_words():
    assert [in_words(n) for n in (0, 13, 40, 99, 100, 762, 905)] == [
        "zero", "thirteen", "forty", "ninety-nine", "one hundred", "seven hundred and sixty-two",
        "nine hundred and five",
    ]  # fmt: skip


def test_only_the_first_sentence_where_a_model_does_not_stop():
    long = "Banana. Fig has more letters.\nQ: Which"
    assert normalise(long, first_sentence=True) == "banana"
    assert not RULES["more_letters"](normalise("fig.\nbanana is longer", first_sentence=True), LETTERS)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/lmentry")
def test_the_answer_alone_is_right_in_all_files_and_the_distractor_wrong():
    files = sorted(DATA.glob("*.json"))
    assert len(files) == 41
    checked = 0
    for file in files:
        rule = RULES[rule_of(file.stem)]
        for example in list(json.loads(file.read_text())["examples"].values())[::3]:
            about = {**example["metadata"], "input": example["input"]}
            if "answer" not in about:
                continue
            checked += 1
            answer = str(about["answer"])
            assert rule(normalise(answer), about), (file.name, answer)
            if "rhym" not in file.name and "homo" not in file.name:
                assert rule(normalise(f"The answer is {answer}."), about), (file.name, answer)
            if "distractor" in about:
                assert not rule(normalise(str(about["distractor"])), about), (file.name, about)
    assert checked > 900
