"""The grader `builtin:references`: how near a response comes to the references of its prompt.

A judge of samples (`judge: {function: builtin:references}`) and a grader of the task `graded`, for data whose prompts
have correct answers that are not to be trained on. `tuna_peft.graders` finds it by name.
"""

from __future__ import annotations

from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.evaluation.superni import exact_match, rouge_l

STEP = 2
"""Grades are rounded to this many points of ROUGE-L, so that a difference below it is a tie and no pair."""

KEYS = ("references", "reference", "output", "response", "answer", "target", "targets")


def grade(record: dict[str, Any], response: str) -> float:
    """1 for a reference (case, punctuation and spacing ignored), else ROUGE-L F1 in steps of 0.02, at most 0.98.

    Args:
        record: The prompt's record; the first of `KEYS` that it has holds one reference, or a list of them.
        response: What to grade.

    Raises:
        UserError: The record has no reference.
    """
    found = next((record[key] for key in KEYS if record.get(key)), None)
    references = [found] if isinstance(found, str) else found
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise UserError(
            "the record has no reference to grade by", where=str(record.get("id", "")),
            fix=f"Give the correct answer, or a list of them, in one of {', '.join(KEYS)}.",
        )  # fmt: skip
    if exact_match(response, references):
        return 1.0
    return min(round(rouge_l(response, references) / STEP) * STEP, 100 - STEP) / 100
