"""Graders that misbehave are named with the prompt."""

import pytest

from tuna_peft.errors import UserError
from tuna_peft.evaluation.graded import evaluate_graded
from tuna_peft.evaluation.session import Answer, Question


class Scripted:
    """A session whose model repeats the prompt."""

    def answers(self, questions, max_new_tokens, task):
        return [Answer(question, question.text, True) for question in questions], []


QUESTIONS = [Question(name, name, name, record={"right": name != "b"}) for name in "abc"]


def graded(grade):
    return evaluate_graded(Scripted(), QUESTIONS, grade, max_new_tokens=4)


def test_grades():
    result = graded(lambda record, response: record["right"])
    assert result.metrics["grade"].value == pytest.approx(2 / 3) and result.metrics["grade"].count == 3
    assert [prompt.scores["grade"] for prompt in result.prompts] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), None, "1"])
def test_no_grade(value):
    with pytest.raises(UserError, match="prompt a: the grader gave"):
        graded(lambda record, response: value)


def test_a_failing_grader():
    with pytest.raises(UserError, match="prompt b: the grader failed with ZeroDivisionError"):
        graded(lambda record, response: 1 / record["right"])
