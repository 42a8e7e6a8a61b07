"""Deals the instances of Super-NI out into sets, none of which share an instance; writes one file for each set."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.superni.sizes import Sizes
from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.texts import prompt_ids
from tuna_peft.evaluation.superni import encode, read_superni
from tuna_peft.files import write_jsonl

Record = dict[str, Any]
CHAT = PromptConfig(template="chat")


def read_instances(folder: Path) -> tuple[list[Record], list[Record]]:
    """Instances of training tasks and of test tasks.

    Args:
        folder: A checkout of allenai/natural-instructions; or a folder with `train_instances.jsonl` and
            `test_instances.jsonl`, one instance a line.

    Raises:
        UserError: Neither is there.
    """
    listed = folder / "splits" / "default" / "train_tasks.txt"
    if listed.is_file():
        train, _ = read_superni(folder, listed.read_text(encoding="utf-8").split(), per_task=100)
        return train, read_superni(folder)[0]
    train, test = (read_superni(folder / f"{part}_instances.jsonl", per_task=None)[0] for part in ("train", "test"))
    return train, test


def deal(
    train: Iterable[Record], test: Iterable[Record], tokenizer: PreTrainedTokenizerBase, sizes: Sizes
) -> dict[str, list[Record]]:
    """The sets by name, each a list of records in Alpaca's format with `task`, `category` and `references`.

    The instances of a task are ordered by a hash of their id, so that the sets depend on nothing else.
    """
    sets: dict[str, list[Record]] = {name: [] for name in (*sizes.per_task, "unseen")}
    known: set[str] = set()
    chosen = _by_task(train, tokenizer, known, sizes.prompt_tokens, sizes.answer_tokens)
    for task in sorted(chosen)[: sizes.tasks]:
        left = iter(chosen[task])
        for name, count in sizes.per_task.items():
            sets[name] += islice(left, count)
    sets["agreement"] = sets["agreement"][: sizes.agreement_prompts]
    for records in _by_task(test, tokenizer, known, sizes.unseen_prompt_tokens, None).values():
        sets["unseen"] += records[: sizes.unseen_per_task]
    return sets


def write_sets(sets: dict[str, list[Record]], folder: Path) -> None:
    """One `NAME.jsonl` for each set."""
    for name, records in sets.items():
        write_jsonl(folder / f"{name}.jsonl", records)


def _by_task(
    instances: Iterable[Record], tokenizer: PreTrainedTokenizerBase, known: set[str], prompt: int, answer: int | None
) -> dict[str, list[Record]]:
    """Usable records of each task in the order of a hash; `known` grows by their texts, which none repeats."""
    template, found = PromptTemplate(CHAT), defaultdict(list)
    for instance in sorted(instances, key=lambda one: hashlib.sha256(one["id"].encode()).hexdigest()):
        text = encode(instance, [])
        lengths = [len(ids) for ids in tokenizer(instance["output"], add_special_tokens=False)["input_ids"]]
        too_long = len(prompt_ids(template.render(text), tokenizer)) > prompt or answer and max(lengths) > answer
        if too_long or text in known:
            continue
        known.add(text)
        found[instance["task"]].append(
            {
                "id": instance["id"], "task": instance["task"], "category": instance["category"], "instruction": text,
                "input": "", "output": instance["output"][0], "references": instance["output"],
            }
        )  # fmt: skip
    return found
