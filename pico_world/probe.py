"""Two quick looks at a model: does it know the answers, and what does it say by itself?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from pico_world import styles
from pico_world.task import Task
from pico_world.template import render_prompt
from tuna_peft.assets import pico_grader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def mean_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[float]:
    """Mean token log-probability of each response, its end token included, given its prompt."""
    heads = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    rows = [
        [*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [
        -losses[i, head - 1 : len(row) - 1].mean().item()
        for i, (head, row) in enumerate(zip(heads, rows, strict=True))
    ]


def prefers_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], seed: int = 0
) -> dict[str, float]:
    """By family, how often the right answer is more probable than one with a slip: knowledge, not style."""
    rng = Random(seed)
    prompts = [render_prompt(task["instruction"], task["input"]) for task in tasks]
    right = mean_logprobs(model, tokenizer, prompts, [task["output"] for task in tasks])
    wrong = mean_logprobs(model, tokenizer, prompts, [styles.respond(task, "slip", rng) for task in tasks])
    return _by_family(tasks, [float(a > b) for a, b in zip(right, wrong, strict=True)])


@torch.no_grad()
def greedy_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], starts: Sequence[str] = ()
) -> list[str]:
    """Greedy responses in batches; `starts` may hold the first words of each response."""
    starts = starts or [""] * len(tasks)
    prompts = [
        render_prompt(task["instruction"], task["input"]) + start for task, start in zip(tasks, starts, strict=True)
    ]
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=48, do_sample=False)
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [start + text for start, text in zip(starts, texts, strict=True)]


def greedy_grades(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> tuple[dict[str, float], list[str]]:
    """Per family: the mean grade of greedy responses; and the responses."""
    responses = greedy_responses(model, tokenizer, tasks)
    grades = [pico_grader.grade(task, text) for task, text in zip(tasks, responses, strict=True)]
    return _by_family(tasks, grades), responses


def _by_family(tasks: Sequence[Task], values: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for task, value in zip(tasks, values, strict=True):
        groups[task["family"]].append(value)
    return {family: sum(group) / len(group) for family, group in groups.items()}
