"""One run of an arm: a LoRA adapter on a copy of the start, some optimiser steps, and what the result can do."""

from __future__ import annotations

import copy
import math
import random
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.contest.data import Row, Split
from benchmarks.contest.pairs import Objective
from benchmarks.flops import counted
from tuna_peft.assets.pico_grader import grade
from tuna_peft.evaluation.ranking import evaluate_ranking
from tuna_peft.models.generation.generate import generate_responses

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WARMUP = 0.05


def trained(
    start: PreTrainedModel,
    objective: Objective,
    rows: list[Row],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    lora: dict[str, Any] = LORA,
) -> tuple[PreTrainedModel, float]:
    """A copy of `start` with a trained adapter merged into it, and the loss of the last step; see `fit`."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(start), LoraConfig(**lora))
    loss = fit(model, objective, rows, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed)
    # Into a clean model: TRL's trainers change the forward pass of theirs.
    clean = copy.deepcopy(start)
    clean.load_state_dict(model.merge_and_unload().state_dict())
    return clean.eval(), loss


def fit(
    model: PeftModel, objective: Objective, rows: list[Row], *, steps: int, batch: int, learning_rate: float, seed: int
) -> float:
    """Trains what of `model` trains, and returns the loss of the last step.

    AdamW without weight decay, gradients clipped at norm 1, linear warm-up and cosine decay; rows are drawn anew in
    every epoch, in an order that depends on `seed` alone, so that arms with the same seed see the same rows.
    """
    loss_of = objective(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    loss = torch.zeros(())
    for chosen in _batches(rows, batch, steps, seed):
        loss = loss_of(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


def flops_per_step(start: PreTrainedModel, objective: Objective, rows: list[Row], batch: int) -> float:
    """FLOPs of a forward and backward pass, the mean of four batches."""
    model = get_peft_model(copy.deepcopy(start), LoraConfig(**LORA))
    loss_of = objective(model)
    with counted() as flops:
        for chosen in _batches(rows, batch, 4, seed=0):
            loss_of(chosen).backward()
    return flops.model / 4


def measured(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, split: Split) -> dict[str, Any]:
    """Ranking accuracy; where there are tasks, the mean grade of greedy responses and their mean length in words."""
    ranked = evaluate_ranking(model, tokenizer, Dataset.from_list(split.ranked), batch_size=split.batch_size)
    accuracy = {"ranking_accuracy": ranked.metrics[ranked.main].value}
    if not split.tasks:
        return accuracy
    texts = generate_responses(model, tokenizer, split.prompts, max_new_tokens=48, batch_size=128)
    grades = [grade(task, text) for task, text in zip(split.tasks, texts, strict=True)]
    return {
        **accuracy,
        "response_score": sum(grades) / len(grades),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }


def timed(function: Any) -> tuple[Any, float]:
    """The result and the processor seconds that it took."""
    before = time.process_time()
    return function(), time.process_time() - before


def _batches(rows: list[Row], batch: int, steps: int, seed: int):
    rng, order = random.Random(seed), []
    for _ in range(steps):
        if len(order) < batch:
            order = rng.sample(range(len(rows)), len(rows))
        yield [rows[order.pop()] for _ in range(batch)]


def _cosine(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
