"""The result of one task on one stage, as tasks return it and as reports, tables and comparisons read it.

A run has one file per stage and task, `evaluation/<stage>/<task>.json`; the model without adapters is stage `base`.
Higher scores are better, except for metrics that are only descriptive (such as `prefers_longer`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.files import write_json
from tuna_peft.json_text import read_json

FOLDER = "evaluation"

RUN_INFO = "run.json"
"""The file that describes a run, or an evaluation of another model. `run` writes it and the report reads it.

Keys: `name`, `seed` (null for an evaluation), `base` (model, revision, fingerprint, quantization), `stages` (names of
the trained ones, in order), `data` (counts by stage or task), `environment` (Python, GPU, packages); an evaluation
also has `adapters` (hashes by stage) and `evaluated` (the stages that were measured, in order).
"""

TITLES = {
    "ranking": "ranking accuracy",
    "graded": "response score",
    "answers": "answer length (characters)",
    "superni-0shot": "Super-NI 0-shot ROUGE-L",
    "superni-2shot": "Super-NI 2-shot ROUGE-L",
    "lmentry": "LMentry accuracy",
    "vicuna": "Vicuna win rate",
}
"""Names of the tasks' main metrics in tables."""

MEANINGS = {
    "ranking": "share of held-out response pairs in which the model finds the better response more likely",
    "graded": "mean grade, 0 to 1, by a Python function, of the model's answers to held-out prompts",
    "answers": "mean length of the model's answers to held-out prompts; longer is not better",
    "superni": "overlap of the answers with the references, in percent",
    "lmentry": "share of correct answers by the benchmark's rules, in percent",
    "vicuna": "share of questions on which a judge prefers the model's answer to the other side's; a tie counts half",
}
"""Explanations of the main metrics, by the task's name up to the first hyphen."""


def in_percent(task: str) -> bool:
    """Whether a task's scores go up to 100, not to 1."""
    return task.partition("-")[0] in ("superni", "lmentry")


def number(value: float | None, *, among: Iterable[float | None] = (), sign: str = "", percent: bool = False) -> str:
    """Formats a metric: one decimal for percentages and if it or one of `among` is above 1, else three decimals."""
    if value is None:
        return "–"
    largest = max(abs(other) for other in (value, *among) if other is not None)
    return format(value, f"{sign}.1f" if percent or largest > 1 else f"{sign}.3f")


@dataclass
class Metric:
    """A measured value.

    Attributes:
        value: None if there was nothing to count.
        low: Lower end of the 95 % interval (bootstrap over prompts); None without an interval.
        high: Its upper end.
        count: Number of prompts or pairs that the value is a mean over.
        percent: Whether the largest possible value is 100; set by `TaskResult`.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 0
    percent: bool = False

    def __str__(self) -> str:
        """`0.623 [0.601, 0.644]`."""
        if self.low is None or self.high is None:
            return number(self.value, percent=self.percent)
        all_three = self.value, self.low, self.high
        value, low, high = (number(one, among=all_three, percent=self.percent) for one in all_three)
        return f"{value} [{low}, {high}]"


@dataclass
class PromptResult:
    """One prompt with the model's response and its scores.

    Attributes:
        id: Unique within the task.
        prompt: The text without the prompt template.
        response: The model's response; for `ranking` the response that it finds most likely.
        scores: By metric. None is a missing score, which does not count as 0.
        weight: Weight in the main metric, which is the weighted mean of the prompts' scores of that name.
        references: The correct responses, by the benchmark or the ranking.
        group: The benchmark's task that the prompt belongs to.
        details: Further values of the task; for `ranking` `v` (length-normalised log-probabilities), `ranks`,
            `lengths` (tokens), each by response, best first.
    """

    id: str
    prompt: str
    response: str
    scores: dict[str, float | None]
    weight: float = 1.0
    references: list[str] = field(default_factory=list)
    group: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Exclusion:
    """What is excluded from all scores, and why.

    Attributes:
        reason: In words.
        count: Number of excluded items.
        names: The first `MOST_NAMES` of the excluded files, tasks or prompts.
    """

    reason: str
    count: int
    names: list[str]

    MOST_NAMES = 20

    @classmethod
    def of(cls, reason: str, names: Iterable[str]) -> Exclusion:
        """Counts and shortens `names`."""
        every = list(names)
        return cls(reason, len(every), every[: cls.MOST_NAMES])


@dataclass
class TaskResult:
    """The result of one task on one stage.

    Attributes:
        task: `ranking`, `graded`, `answers`, `superni-0shot` (of any number of shots), `lmentry`, `vicuna`, `lm_eval`.
        main: The metric that tables show and that comparisons between stages and runs use.
        metrics: By name.
        prompts: All scored prompts.
        groups: Metrics of subsets, by a name such as `category: Textual Entailment` or `task: bigger_number`.
        excluded: What is not in the scores.
        settings: What the result depends on besides the model; a saved result is reused only if they are equal.
        seconds: Wall time.
    """

    task: str
    main: str
    metrics: dict[str, Metric]
    prompts: list[PromptResult]
    groups: dict[str, dict[str, Metric]] = field(default_factory=dict)
    excluded: list[Exclusion] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for metrics in (self.metrics, *self.groups.values()):
            for metric in metrics.values():
                metric.percent = in_percent(self.task)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, Any]:
        """Plain JSON with the number of prompts in place of the prompts."""
        return {**self.as_dict(), "prompts": len(self.prompts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskResult:
        """The inverse of `as_dict`."""
        parts = {
            "metrics": _metrics(values["metrics"]),
            "prompts": [PromptResult(**prompt) for prompt in values["prompts"]],
            "groups": {name: _metrics(group) for name, group in values["groups"].items()},
            "excluded": [Exclusion(**exclusion) for exclusion in values["excluded"]],
        }
        return cls(**{**values, **parts})


def save_result(folder: Path, stage: str, result: TaskResult) -> None:
    """Writes `folder/evaluation/<stage>/<task>.json`, all at once."""
    write_json(folder / FOLDER / stage / f"{result.task}.json", result.as_dict())


def load_result(folder: Path, stage: str, task: str) -> TaskResult | None:
    """The saved result; None without one.

    Raises:
        UserError: The file does not hold a result.
    """
    file = folder / FOLDER / stage / f"{task}.json"
    if not file.is_file():
        return None
    try:
        return TaskResult.from_dict(read_json(file, "evaluation result", "Delete it and evaluate again."))
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"this is no evaluation result: {error}"
        raise UserError(what, where=str(file), fix="Delete it and evaluate again.") from error


def load_results(folder: Path, stages: Iterable[str] | None = None) -> dict[str, dict[str, TaskResult]]:
    """All results of a run: by stage (in the order of `stages`, else of names with `base` first), then by task."""
    inside = folder / FOLDER
    if stages is None:
        found = (entry.name for entry in inside.iterdir() if entry.is_dir()) if inside.is_dir() else ()
        stages = sorted(found, key=lambda name: (name != "base", name))
    results: dict[str, dict[str, TaskResult]] = {}
    for stage in stages:
        for file in sorted((inside / stage).glob("*.json")):
            result = load_result(folder, stage, file.stem)
            if result is not None:
                results.setdefault(stage, {})[result.task] = result
    return results


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    return {name: Metric(**metric) for name, metric in values.items()}
