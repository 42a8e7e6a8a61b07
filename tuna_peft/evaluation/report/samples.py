"""Chooses prompts to show with the responses of all stages: the largest gains and losses, and others. For `build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.evaluation.results import PromptResult, TaskResult

Results = dict[str, dict[str, TaskResult]]

_NOT_ANSWERED = ("ranking", "lm_eval")

BEST, WORST, OTHERS = 3, 2, 3


def choose_samples(results: Results, wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The chosen prompts of the first task in which the model answers (all the `wanted` ones).

    Args:
        results: By stage and task.
        wanted: Ids of prompts; by default the prompts whose score rose most from the first stage to the last (`why` is
            `gained`) or fell most (`lost`), and some in between, evenly spaced (`typical`).

    Returns:
        `id`, `task`, `prompt`, `references`, `why`, and by stage in `responses` the `text` and the `score`.

    Raises:
        UserError: A wanted prompt is not in the evaluation.
    """
    task = _answered_task(results, wanted)
    if task is None:
        if wanted:
            raise UserError("no task of this run has the model answer prompts", fix="Leave out the ids of prompts.")
        return []
    stages = {stage: {prompt.id: prompt for prompt in tasks[task].prompts} for stage, tasks in results.items()
              if task in tasks}  # fmt: skip
    last = stages[list(stages)[-1]]
    if missing := [name for name in wanted if name not in last]:
        raise UserError(
            f"no prompt {missing[0]!r} among those that the task {task} scored",
            fix=f"Ids look like {', '.join(list(last)[:3])}.",
        )
    main = results[list(stages)[-1]][task].main
    chosen = [(name, "chosen") for name in wanted] or _chosen(stages, main)
    return [
        {
            "id": name,
            "task": task,
            "prompt": last[name].prompt,
            "references": last[name].references[:3],
            "why": why,
            "responses": {
                stage: {"text": prompts[name].response, "score": prompts[name].scores.get(main)}
                for stage, prompts in stages.items()
                if name in prompts
            },
        }
        for name, why in chosen
    ]


def is_answered(result: TaskResult) -> bool:
    """Whether its responses are the model's own answers to read."""
    return result.task.partition("-")[0] not in _NOT_ANSWERED and bool(result.prompts)


def _answered_task(results: Results, wanted: Sequence[str]) -> str | None:
    last = results[list(results)[-1]] if results else {}
    answered = [task for task in last if is_answered(last[task])]
    holding = (task for task in answered if {*wanted} <= {prompt.id for prompt in last[task].prompts})
    return next(holding, answered[0] if answered else None)


def _chosen(stages: dict[str, dict[str, PromptResult]], main: str) -> list[tuple[str, str]]:
    names = list(stages)
    first, last = stages[names[0]], stages[names[-1]]
    gains = {}
    for name in last:
        before, after = first[name].scores.get(main) if name in first else None, last[name].scores.get(main)
        if before is not None and after is not None:
            gains[name] = after - before
    order = sorted(gains, key=lambda name: -gains[name])  # stable: equal gains in the order of the data
    gained = [name for name in order[:BEST] if gains[name] > 0]
    lost = [name for name in order[::-1][:WORST] if gains[name] < 0]
    between = [name for name in last if (name in gains or not gains) and name not in {*gained, *lost}]
    step = max(1, len(between) // OTHERS)
    typical = between[step // 2 :: step][:OTHERS]
    return [*((n, "gained") for n in gained), *((n, "lost") for n in lost), *((n, "typical") for n in typical)]
