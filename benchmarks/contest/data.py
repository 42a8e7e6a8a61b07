"""Lists, held-out lists and prompts of pico-LLaMA's world, the same for every arm.

Training lists are drawn as the quickstart's judge data is: four answers in different styles and the right one, ordered
by their grade with an occasional swap of neighbours. Beside the ranks they keep the grades, for margins that grow with
the difference in score. Validation comes from the held-out side of the split and shares no prompt with the test set,
which is the quickstart's `heldout.jsonl`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from random import Random
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pico_world import families, mixtures, styles
from pico_world.template import render_prompt
from tuna_peft.assets import pico_grader
from tuna_peft.data.texts import prompt_ids
from tuna_peft.data.tokenize import encode_dataset

Row = dict[str, Any]
TRAINING_LISTS, VALIDATION_LISTS = 1000, 105
JUDGE_ERROR = 0.05
_SEED = 20_000


@dataclass
class Split:
    """Encoded ranked rows, and the same prompts with their task records where a program can grade responses."""

    ranked: list[Row]
    prompts: list[list[int]] = field(default_factory=list)
    tasks: list[Row] = field(default_factory=list)
    batch_size: int = 64


@dataclass
class World:
    """A start, and the data that its contest is about."""

    start: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lists: list[Row]
    validation: Split
    test: Split


def training_lists(tokenizer: PreTrainedTokenizerBase, judge_error: float = JUDGE_ERROR) -> list[Row]:
    """Encoded lists, best first, with `ranks` and `scores`; a share of `judge_error` has two neighbors swapped."""
    rng = Random(_SEED)
    tasks = list(families.distinct(rng, TRAINING_LISTS, held_out=False, label="contest"))
    rng.shuffle(tasks)
    return _encoded([_judged(task, rng, judge_error) for task in tasks], tokenizer)


def validation(tokenizer: PreTrainedTokenizerBase) -> Split:
    """For choosing learning rates."""
    test = {(task["instruction"], task["input"]) for task in _test_records()}
    rng = Random(_SEED + 1)
    drawn = families.distinct(rng, 2 * VALIDATION_LISTS, held_out=True, label="validation")
    tasks = [task for task in drawn if (task["instruction"], task["input"]) not in test][:VALIDATION_LISTS]
    return _split([{**task, "responses": _graded(task, mixtures.HELD_OUT, rng)} for task in tasks], tokenizer)


def test(tokenizer: PreTrainedTokenizerBase) -> Split:
    """The quickstart's held-out prompts."""
    return _split(_test_records(), tokenizer)


def _test_records() -> list[Row]:
    file = resources.files("tuna_peft.assets") / "pico_llama/data/heldout.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _judged(task: Any, rng: Random, judge_error: float) -> Row:
    responses = _graded(task, mixtures.JUDGE, rng)
    if task["output"] not in [response["text"] for response in responses]:
        responses.append({"text": task["output"], "score": 1.0})
    responses.sort(key=lambda response: -response["score"])
    if rng.random() < judge_error:
        i = rng.randrange(len(responses) - 1)
        a, b = responses[i], responses[i + 1]
        a["text"], b["text"] = b["text"], a["text"]
    return {**task, "responses": responses}


def _graded(task: Any, mixture: mixtures.Mixture, rng: Random) -> list[Row]:
    texts = [styles.respond(task, style, rng) for style in mixtures.pick_different(mixture, 4, rng)]
    return [{"text": text, "score": pico_grader.grade(task, text)} for text in dict.fromkeys(texts)]


def _split(records: list[Row], tokenizer: PreTrainedTokenizerBase) -> Split:
    prompts = [prompt_ids(render_prompt(record["instruction"], record["input"]), tokenizer) for record in records]
    return Split(_encoded(records, tokenizer), prompts, records)


def _encoded(records: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    rows = [
        {
            "id": record["id"],
            "prompt": render_prompt(record["instruction"], record["input"]),
            "completions": [response["text"] for response in record["responses"]],
            "scores": [response["score"] for response in record["responses"]],
        }
        for record in records
    ]
    rows = [row for row in rows if len(set(row["scores"])) > 1]
    return list(encode_dataset(Dataset.from_list(rows), tokenizer, max_length=None)[0])
