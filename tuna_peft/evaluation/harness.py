"""The task `lm_eval`: EleutherAI's lm-evaluation-harness on a model with unmerged adapters. `run.tasks` calls it.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.evaluation.results import Exclusion, Metric, PromptResult, TaskResult
from tuna_peft.evaluation.session import Session
from tuna_peft.models.generation.generate import context_of

_MAX_LENGTH = 2048  # to which the harness truncates by default
_Z95 = 1.959964  # the harness gives standard errors; this many of them are half a 95 % interval


def require_harness() -> None:
    """Raises `UserError` if the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the task lm_eval needs EleutherAI's harness, which is not installed",
            fix="Install it: pip install lm-eval",
        ) from error


def evaluate_harness(
    session: Session,
    *,
    tasks: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> TaskResult:
    """Runs the harness on the loaded model, adapters included, and converts its results.

    Args:
        tasks: Names of tasks or groups in the harness.
        include_path: A folder with further task files.
        num_fewshot: Examples in the prompt; None is each task's own number.
        limit: Number of documents of each task; None takes all.

    Returns:
        Metrics named `<task>: <metric>`, with intervals from the harness's standard errors. The first is the main
        metric, and its score is kept for each document.

    Raises:
        UserError: A task does not exist, or the harness is not installed.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UserError(
            f"the harness has no task {', '.join(unknown)}",
            where="evaluation.tasks.lm_eval.tasks",
            fix="`lm-eval ls tasks` lists them; `include_path` adds your own.",
        )
    longest = min(context_of(session.model) or _MAX_LENGTH, _MAX_LENGTH)
    size = session.size("lm_eval", [(longest - 1, (1,))])
    model = HFLM(pretrained=session.model, tokenizer=session.tokenizer, batch_size=size)
    found = simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager,
        bootstrap_iters=1000, verbosity="WARNING",
    )  # fmt: skip
    return table_as_result(found)


def table_as_result(found: dict[str, Any]) -> TaskResult:
    """Converts the harness's results. Metrics without a number are listed as excluded."""
    metrics: dict[str, Metric] = {}
    missing: list[str] = []
    for task, values in found["results"].items():
        count = (found.get("n-samples") or {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if name.endswith("_stderr") or name in ("alias", "name", "sample_len", "sample_count") or not filter_name:
                continue
            label = f"{task}: {name}" + ("" if filter_name == "none" else f" ({filter_name})")
            if not isinstance(value, int | float):
                missing.append(label)
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            half = _Z95 * error if isinstance(error, int | float) else None
            low, high = (None, None) if half is None else (value - half, value + half)
            metrics[label] = Metric(float(value), low, high, count)
    if not metrics:
        raise UserError("the harness measured nothing", where="evaluation.tasks.lm_eval")
    main = next(iter(metrics))
    excluded = [Exclusion.of("the harness gave no number", missing)] if missing else []
    return TaskResult("lm_eval", main, metrics, _prompts(found, main), excluded=excluded)


def _prompts(found: dict[str, Any], main: str) -> list[PromptResult]:
    """The documents of the main metric's task with their scores."""
    task, name = main.partition(": ")[::2]
    name = name.partition(" (")[0]
    return [
        PromptResult(
            str(sample["doc_id"]),
            str((sample.get("arguments") or [("",)])[0][0]),
            str(sample.get("filtered_resps") or sample.get("resps")),
            {main: float(sample[name]) if isinstance(sample.get(name), int | float) else None},
            references=[str(sample.get("target"))],
            group=task,
        )
        for sample in (found.get("samples") or {}).get(task, [])
    ]
