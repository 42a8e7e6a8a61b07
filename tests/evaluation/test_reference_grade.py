"""The grader `builtin:references`: exact match first, then ROUGE-L in steps."""

import pytest

from tuna_peft.errors import UserError
from tuna_peft.evaluation.reference_grade import grade
from tuna_peft.graders import load_grader

REFERENCE = "the cat sat on the mat"


def test_a_match_is_one_whatever_its_case_and_punctuation():
    assert grade({"output": REFERENCE}, "The cat sat on the mat.") == 1
    assert grade({"references": ["no", REFERENCE]}, REFERENCE) == 1


def test_an_order_of_the_same_words_is_not_a_match():
    # ROUGE-1 would be 1; the longest common subsequence has 5 of 6 words, an F1 of 83.3 points, to the nearest 2.
    assert grade({"output": REFERENCE}, "cat sat on the mat the") == pytest.approx(0.84)


def test_stemmed_words_count_and_never_make_a_match():
    assert grade({"output": "the cats sat"}, "the cat sat") == 0.98


def test_less_than_two_points_apart_is_a_tie():
    words = [f"w{i}" for i in range(200)]
    record = {"output": " ".join(words)}
    # F1 of k of 200 words in order is 2k / (k + 200): 66.7, 67.1, 68.0 points for 100, 101, 103 of them.
    by_length = {k: grade(record, " ".join(words[:k])) for k in (100, 101, 103)}
    assert by_length == {100: pytest.approx(0.66), 101: pytest.approx(0.68), 103: pytest.approx(0.68)}


def test_the_first_key_with_a_text_counts():
    assert grade({"references": [], "output": "", "response": "yes", "answer": "no"}, "yes") == 1


@pytest.mark.parametrize("record", [{}, {"output": ""}, {"references": [1]}, {"output": {"text": "a"}}])
def test_a_record_without_a_reference_is_an_error(record):
    with pytest.raises(UserError, match="no reference"):
        grade(record, "a")


def test_it_is_found_by_name():
    assert load_grader("builtin:references", "judge.function") is grade
