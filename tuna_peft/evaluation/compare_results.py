"""Compares two results of one task prompt by prompt, for the report and for `tuna-peft compare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tuna_peft.evaluation.bootstrap import paired_difference
from tuna_peft.evaluation.results import Metric, PromptResult, TaskResult, in_percent


@dataclass
class Pairing:
    """One prompt in both results.

    Attributes:
        id: The prompt's id.
        prompt: The prompt's text.
        responses: The first result's response and the second's.
        scores: The scores of both responses in the task's main metric.
        references: What counts as right.
    """

    id: str
    prompt: str
    responses: tuple[str, str]
    scores: tuple[float, float]
    references: list[str] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """By how much the second is better."""
        return self.scores[1] - self.scores[0]


@dataclass
class ResultComparison:
    """The second result compared with the first.

    Attributes:
        task: The task.
        metric: Its main metric.
        values: The metric of the first and of the second result, over the prompts that both have.
        difference: The second minus the first, with its interval by the paired bootstrap; None without common prompts.
        wins: Prompts on which the second is better, the largest gain first.
        losses: Prompts on which it is worse, the largest loss first.
        ties: Number of prompts with equal scores.
        only_first: Number of prompts that the second result lacks.
        only_second: Number of prompts that the first result lacks.
        unscored: Number of common prompts that lack a score in either result.
    """

    task: str
    metric: str
    values: tuple[float, float] | None = None
    difference: Metric | None = None
    wins: list[Pairing] = field(default_factory=list)
    losses: list[Pairing] = field(default_factory=list)
    ties: int = 0
    only_first: int = 0
    only_second: int = 0
    unscored: int = 0


def compare_results(first: TaskResult, second: TaskResult) -> ResultComparison:
    """Pairs prompts of the same id and text. Only prompts that have a score in both and a weight above 0 count."""
    comparison = ResultComparison(second.task, second.main)
    mine, theirs = _by_content(first.prompts), _by_content(second.prompts)
    comparison.only_first, comparison.only_second = len(mine.keys() - theirs), len(theirs.keys() - mine)
    pairings, weights = [], []
    for key in (key for key in mine if key in theirs):
        one, other = mine[key], theirs[key]
        if not other.weight:  # not part of the main metric
            continue
        scores = one.scores.get(second.main), other.scores.get(second.main)
        if scores[0] is None or scores[1] is None:
            comparison.unscored += 1
            continue
        pairings.append(
            Pairing(one.id, one.prompt, (one.response, other.response), (scores[0], scores[1]), other.references)
        )
        weights.append(other.weight)
    comparison.wins = sorted((one for one in pairings if one.gain > 0), key=lambda one: -one.gain)
    comparison.losses = sorted((one for one in pairings if one.gain < 0), key=lambda one: one.gain)
    comparison.ties = len(pairings) - len(comparison.wins) - len(comparison.losses)
    if pairings:
        columns = [[pairing.scores[side] for pairing in pairings] for side in (0, 1)]
        first_mean, second_mean = (float(np.average(column, weights=weights)) for column in columns)
        comparison.values = first_mean, second_mean
        comparison.difference = paired_difference(columns[0], columns[1], weights)
        comparison.difference.percent = in_percent(second.task)
    return comparison


def _by_content(prompts: Sequence[PromptResult]) -> dict[tuple[str, str, int], PromptResult]:
    """By id, text, and a number that tells apart prompts which a user's data repeats."""
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for prompt in prompts:
        key = prompt.id, prompt.prompt
        keyed[prompt.id, prompt.prompt, seen[key]] = prompt
        seen[key] += 1
    return keyed
