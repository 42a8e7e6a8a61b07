"""The task `graded`: a Python function grades the model's answers to held-out prompts. `run.tasks` calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuna_peft.errors import UserError
from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.results import TaskResult
from tuna_peft.evaluation.session import Question, Session
from tuna_peft.graders import Grader

MAIN = "grade"


def evaluate_graded(
    session: Session, questions: Sequence[Question], grade: Grader, *, max_new_tokens: int
) -> TaskResult:
    """Greedy answers and their grades, between 0 and 1.

    Args:
        questions: The prompts; `record` holds the raw record, which is passed to the grader.
        grade: See `tuna_peft.graders`.
        max_new_tokens: Length at which an answer is truncated.

    Raises:
        UserError: For some prompt, the grader fails or does not return a number between 0 and 1.
    """
    answers, excluded = session.answers(questions, max_new_tokens, "graded")
    prompts = []
    for answer in answers:
        question = answer.question
        try:
            value = grade(question.record, answer.text)
        except Exception as error:
            what = f"the grader failed with {type(error).__name__}: {error}"
            raise UserError(what, where=f"prompt {question.id}", fix="Correct it; the answers are kept.") from error
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
            raise UserError(
                f"the grader gave {value!r}, and a grade is a number between 0 and 1", where=f"prompt {question.id}"
            )
        prompts.append(answer.scored({MAIN: float(value)}))
    metrics = {MAIN: mean_metric([prompt.scores[MAIN] for prompt in prompts])}
    return TaskResult("graded", MAIN, metrics, prompts, excluded=excluded)
