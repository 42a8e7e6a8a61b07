"""Runs the tasks of an evaluation on one stage after the other, each once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from tuna_peft.errors import UserError
from tuna_peft.evaluation.results import TaskResult, load_result, save_result
from tuna_peft.evaluation.session import Session
from tuna_peft.run.tasks import Task

logger = logging.getLogger("tuna_peft")


def evaluate_stage(session: Session, tasks: Sequence[Task]) -> dict[str, TaskResult]:
    """Runs each task, unless the session's folder has its result, and saves it.

    Returns:
        The results by task.

    Raises:
        UserError: The folder has a result of the same name that comes from other data or settings.
    """
    results = {}
    for task in tasks:
        result = load_result(session.folder, session.stage, task.name)
        if result is not None and result.settings != task.settings:
            keys = {*task.settings, *result.settings}
            differing = sorted(key for key in keys if task.settings.get(key) != result.settings.get(key))
            raise UserError(
                f"{session.stage} has a result for {task.name} already, with other settings ({', '.join(differing)})",
                where=str(session.folder),
                fix="Choose another --output, or delete the old result.",
            )
        if result is None:
            started = time.monotonic()
            result = task.run(session)
            result.settings, result.seconds = task.settings, round(time.monotonic() - started, 2)
            save_result(session.folder, session.stage, result)
            logger.info("%s: %s", session.stage, describe(result))
        results[task.name] = result
    return results


def describe(result: TaskResult) -> str:
    """The main metric in a line, and what was left out."""
    metric = result.metrics[result.main]
    shown = "nothing to count" if metric.value is None else str(metric)
    left_out = "".join(f"; left out: {one.count} ({one.reason})" for one in result.excluded)
    return f"{result.task} {result.main} {shown} over {metric.count:,}{left_out}"
