"""`report.json`: everything that a run has measured, read from the files in its folder. `write` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.evaluation.compare_results import compare_results
from tuna_peft.evaluation.report.curves import read_curves
from tuna_peft.evaluation.report.distributions import by_rank
from tuna_peft.evaluation.report.samples import choose_samples, is_answered
from tuna_peft.evaluation.results import RUN_INFO, TaskResult, load_results
from tuna_peft.json_text import read_json

Report = dict[str, Any]
Results = dict[str, dict[str, TaskResult]]


def build_report(folder: Path, prompts: Sequence[str] = ()) -> Report:
    """The report of the run in `folder`, finished or not, or of the evaluation of another model.

    Args:
        folder: See `tuna_peft.run.folder`, or what `tuna_peft.run.evaluate` wrote.
        prompts: Ids of the prompts to show with every stage's response; by default `choose_samples` chooses.

    Returns:
        `name`, `seed`, `base`, `environment`, `data`, `exports`, `recipe`; `stages`: the training summaries;
        `evaluation`: the results by stage and task, each with `answer_length` (mean characters of the answers);
        `changes`: differences of the main metrics from the stage before, paired by prompt; `curves`, `v_by_rank`,
        `by_length`, `samples`: what the figures show.

    Raises:
        UserError: The folder holds no run or evaluation, or its evaluation lacks a prompt.
    """
    facts = _json(folder / RUN_INFO)
    if facts is None:
        fix = f"Name a folder with {RUN_INFO}, as `run` and `evaluate` make it."
        raise UserError("this is no folder of a run or an evaluation", where=str(folder), fix=fix)
    names = facts.pop("stages")
    stages = {name: _json(folder / f"stages/{name}/done.json") for name in names}
    order = facts.pop("evaluated", ["base", *names])
    results = load_results(folder, order)
    recipe = folder / "recipe.yaml"
    return {
        **facts,
        "stages": stages,
        "evaluation": {
            stage: {
                task: {**result.summary(), "answer_length": _answer_length(result)}
                for task, result in results.get(stage, {}).items()
            }
            for stage in order
            if stage in results or stages.get(stage)
        },
        "changes": _changes(results),
        "exports": _json(folder / "exports.json") or {},
        "curves": {name: read_curves(_json(folder / f"stages/{name}/log_history.json") or []) for name in names},
        "v_by_rank": by_rank({stage: tasks["ranking"] for stage, tasks in results.items() if "ranking" in tasks}),
        "by_length": _by_length(results),
        "samples": choose_samples(results, prompts),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.exists() else "",
    }


def _changes(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Each stage's main metrics minus those of the stage before, over the prompts that have a score in both."""
    changes: dict[str, dict[str, dict[str, Any]]] = {}
    for before, after in pairwise(results):
        for task, result in results[after].items():
            if task in results[before] and (change := compare_results(results[before][task], result).difference):
                changes.setdefault(after, {})[task] = {"against": before, **asdict(change)}
    return changes


def _answer_length(result: TaskResult) -> float | None:
    """Mean length of the model's own answers, in characters; None for a task without any."""
    if not is_answered(result):
        return None
    return sum(len(prompt.response) for prompt in result.prompts) / len(result.prompts)


def _by_length(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Pairwise accuracy by stage and by how much longer the better of two responses is."""
    found: dict[str, list[dict[str, Any]]] = {}
    for stage, ranking in ((stage, tasks["ranking"]) for stage, tasks in results.items() if "ranking" in tasks):
        for name, metrics in ranking.groups.items():
            metric = asdict(metrics[ranking.main])
            if metric["value"] is not None:
                entry = {key: metric[key] for key in ("value", "low", "high", "count")}
                found.setdefault(stage, []).append({"group": name.removeprefix("better / worse length: "), **entry})
    return found


def _json(file: Path) -> Any | None:
    return read_json(file, "record of a run") if file.exists() else None
