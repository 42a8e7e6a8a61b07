"""The task `answers`: what the model answers to held-out prompts, and how long its answers are. `run.tasks` calls it.

Nothing grades the answers: the report shows them, and warns if they become much shorter.
"""

from __future__ import annotations

from collections.abc import Sequence

from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.results import TaskResult
from tuna_peft.evaluation.session import Question, Session

MAIN = "characters"


def evaluate_answers(session: Session, questions: Sequence[Question], *, max_new_tokens: int) -> TaskResult:
    """Greedy answers, and their mean length in characters (the main metric, which is only descriptive).

    Args:
        questions: The prompts; their references are shown beside the answers.
        max_new_tokens: Length at which an answer is truncated.
    """
    answers, excluded = session.answers(questions, max_new_tokens, "answers")
    prompts = [answer.scored({}) for answer in answers]
    metrics = {MAIN: mean_metric([float(len(prompt.response)) for prompt in prompts])}
    return TaskResult("answers", MAIN, metrics, prompts, excluded=excluded)
