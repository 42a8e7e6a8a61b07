"""LMentry's metrics, in percent: accuracy over the core tasks, four kinds of robustness, the LMentry score.

Robustness is 100 minus the largest difference in accuracy between things that should not matter: the wording of the
prompt, the order or the content of its arguments, or which of two neighbouring tasks it is (section 4 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuna_peft.evaluation.results import Metric, PromptResult

ARGUMENT_ORDER = (
    "more_letters", "less_letters", "first_alphabetically", "rhyming_word", "homophones", "bigger_number",
    "smaller_number",
)  # fmt: skip

ARGUMENT_CONTENT = {
    "first_alphabetically": (
        "far_first_letter", "different_first_letter", "consecutive_first_letter", "same_first_letter",
    ),
    "all_words_from_category": ("0_distractors", "1_distractors", "2_distractors"),
    "any_words_from_category": ("5_distractors", "4_distractors", "3_distractors"),
    "rhyming_word": ("orthographically_similar", "orthographically_different"),
    "more_letters": ("length_diff_3plus", "length_diff_1"),
    "less_letters": ("length_diff_3plus", "length_diff_1"),
}  # fmt: skip

ADJACENT = (
    ("bigger_number", "smaller_number"),
    ("more_letters", "less_letters"),
    ("word_after", "word_before"),
    ("most_associated_word", "least_associated_word"),
    ("any_words_from_category", "all_words_from_category"),
    ("sentence_containing", "sentence_not_containing"),
    ("word_containing", "word_not_containing"),
    ("starts_with_word", "starts_with_letter"),
    ("ends_with_word", "ends_with_letter"),
    ("sentence_containing", "word_containing"),
    ("sentence_not_containing", "word_not_containing"),
    ("first_word", "first_letter"),
    ("last_word", "last_letter"),
    ("starts_with_word", "ends_with_word"),
    ("starts_with_letter", "ends_with_letter"),
    ("first_word", "last_word"),
    ("first_letter", "last_letter"),
)

VARIANTS = tuple(f"{task}_{name}" for task, names in ARGUMENT_CONTENT.items() for name in names)


@dataclass(frozen=True)
class Scored:
    """Accuracy on the examples of one file: overall, by template, and by the place of the answer."""

    accuracy: float
    by_template: list[float]
    by_place: list[float]

    @classmethod
    def of(cls, prompts: Sequence[PromptResult]) -> Scored:
        """From the examples' scores, with `template` and `place` in their details."""

        def parts(key: str) -> list[float]:
            names = sorted({prompt.details[key] for prompt in prompts if prompt.details[key] is not None})
            return [_accuracy([prompt for prompt in prompts if prompt.details[key] == name]) for name in names]

        return cls(_accuracy(prompts), parts("template"), parts("place"))


def robustness(scored: dict[str, Scored]) -> dict[str, Metric]:
    """The four robustness metrics over the tasks in `scored`. Without any task for it, a metric has no value."""
    kinds = {
        "robustness_argument_order": [
            scored[task].by_place for task in ARGUMENT_ORDER if task in scored and len(scored[task].by_place) == 2
        ],
        "robustness_argument_content": [
            [scored[f"{task}_{name}"].accuracy for name in names]
            for task, names in ARGUMENT_CONTENT.items()
            if all(f"{task}_{name}" in scored for name in names)
        ],
        "robustness_template": [
            one.by_template for task, one in scored.items() if task not in VARIANTS and len(one.by_template) > 1
        ],
        "robustness_adjacent_tasks": [
            [scored[task].accuracy for task in pair] for pair in ADJACENT if all(task in scored for task in pair)
        ],
    }
    return {name: _mean([100 - (max(group) - min(group)) for group in groups]) for name, groups in kinds.items()}


def _accuracy(prompts: Sequence[PromptResult]) -> float:
    return sum(prompt.scores["accuracy"] or 0.0 for prompt in prompts) / len(prompts)


def _mean(values: Sequence[float]) -> Metric:
    return Metric(sum(values) / len(values), count=len(values)) if values else Metric(None)
