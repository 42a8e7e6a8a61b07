"""The tasks of a recipe's evaluation, read before anything is trained, and run on one stage after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.load import load_prompts
from tuna_peft.errors import UserError
from tuna_peft.evaluation.graded import evaluate_graded
from tuna_peft.evaluation.ranking import evaluate_ranking
from tuna_peft.evaluation.results import TaskResult, load_result, save_result
from tuna_peft.evaluation.session import Question, Session
from tuna_peft.graders import load_grader
from tuna_peft.journal import content_key
from tuna_peft.recipe.evaluation_schema import GradedTask, RankingTask

logger = logging.getLogger("tuna_peft")


@dataclass(frozen=True)
class Task:
    """One thing to measure, with its data in memory.

    Attributes:
        name: Of its result.
        run: Measures it.
        settings: What its result depends on besides the model.
    """

    name: str
    run: Callable[[Session], TaskResult]
    settings: dict[str, Any]


def ranking_task(settings: RankingTask, rows: Dataset) -> Task:
    """The task `ranking` on encoded rows."""

    def run(session: Session) -> TaskResult:
        return evaluate_ranking(
            session.model, session.tokenizer, rows, batch_size=session.batch_size, margin=settings.margin,
            description=f"ranking ({session.stage})",
        )  # fmt: skip

    digest = content_key(rows=[[row["prompt_ids"], row["completions_ids"], row["ranks"]] for row in rows])
    return Task("ranking", run, {"margin": settings.margin, "data": digest})


def graded_task(settings: GradedTask, prompt: PromptConfig) -> tuple[Task, dict[str, Any]]:
    """The task `graded`, and what became of its records."""
    grader = load_grader(settings.grader, "evaluation.tasks.graded.grader")
    prompts, read = load_prompts(settings, prompt)
    questions = [
        Question(entry["id"], _text(entry["prompt"]), entry["prompt"], record=entry["record"]) for entry in prompts
    ]
    run = partial(evaluate_graded, questions=questions, grade=grader, max_new_tokens=settings.max_new_tokens)
    digest = content_key(prompts=[question.prompt for question in questions])
    kept = settings.model_dump(include={"grader", "max_new_tokens"})
    return Task("graded", run, {**kept, "data": digest}), read.as_dict()


def evaluate_stage(folder: Path, session: Session, tasks: list[Task]) -> dict[str, TaskResult]:
    """Runs each task, unless `folder` has its result, and saves it.

    Returns:
        The results by task.

    Raises:
        UserError: The folder has a result of the same name that comes from other data or settings.
    """
    results = {}
    for task in tasks:
        result = load_result(folder, session.stage, task.name)
        if result is not None and result.settings != task.settings:
            differing = sorted(
                key for key in {*task.settings, *result.settings}
                if task.settings.get(key) != result.settings.get(key)
            )  # fmt: skip
            raise UserError(
                f"{session.stage} has a result for {task.name} already, from other settings: {', '.join(differing)}",
                where=str(folder),
                fix="Choose another --output, or delete the old result.",
            )
        if result is None:
            started = time.monotonic()
            result = task.run(session)
            result.settings, result.seconds = task.settings, round(time.monotonic() - started, 2)
            save_result(folder, session.stage, result)
            logger.info("%s: %s", session.stage, _line(result))
        results[task.name] = result
    return results


def _line(result: TaskResult) -> str:
    metric = result.metrics[result.main]
    if metric.value is None:
        shown = "nothing to count"
    elif metric.low is None:
        shown = f"{metric.value:.3f}"
    else:
        shown = f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
    left_out = sum(exclusion.count for exclusion in result.excluded)
    return f"{result.task} {result.main} {shown}" + (f", {left_out} left out" if left_out else "")


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
