"""What a recipe measures of a model: before the first stage and after each."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.evaluation.ranking import ranking_accuracy
from tuna_peft.graders import load_grader
from tuna_peft.models.generation import generate_responses
from tuna_peft.recipe.inputs import Inputs
from tuna_peft.recipe.schema import Recipe


def evaluate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, inputs: Inputs, name: str
) -> dict[str, Any]:
    """`ranking_accuracy` and `response_score` (where the recipe has data for them), `seconds`, and the responses."""
    settings, started = recipe.evaluation, time.monotonic()
    result: dict[str, Any] = {}
    if settings and inputs.ranked is not None:
        result |= ranking_accuracy(
            model, inputs.ranked, pad_token_id=tokenizer.pad_token_id, batch_size=settings.batch_size,
            description=f"ranking ({name})",
        )  # fmt: skip
    if settings and inputs.prompts is not None and settings.grader is not None:
        grade = load_grader(settings.grader)
        responses = generate_responses(
            model, tokenizer, [prompt["ids"] for prompt in inputs.prompts],
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, description=f"answering ({name})",
        )  # fmt: skip
        grades = [grade(prompt["record"], text) for prompt, text in zip(inputs.prompts, responses, strict=True)]
        result["response_score"] = sum(grades) / len(grades)
        result["responses"] = [
            {"id": prompt["id"], "response": text, "grade": score}
            for prompt, text, score in zip(inputs.prompts, responses, grades, strict=True)
        ]
    result["seconds"] = round(time.monotonic() - started, 2)
    return result
