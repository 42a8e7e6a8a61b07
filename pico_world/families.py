"""All task families, and the functions that sample tasks from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from pico_world import list_families as lists
from pico_world import question_families as questions
from pico_world.split import is_held_out
from pico_world.task import Task

PHRASINGS = 6
"""Every family can be worded in this many ways."""

FAMILIES: dict[str, Callable[[Random, int], lists.Draft]] = {
    "sort_words": lists.sort_words,
    "sort_numbers": lists.sort_numbers,
    "filter_category": lists.filter_category,
    "reverse": lists.reverse,
    "plural": lists.make_plural,
    "name_members": lists.name_members,
    "count_items": questions.count_items,
    "compare_numbers": questions.compare_numbers,
    "arithmetic": questions.arithmetic,
    "extract": questions.extract,
    "past_tense": questions.past_tense,
    "membership": questions.membership,
    "position": questions.position,
    "odd_one_out": questions.odd_one_out,
    "opposite": questions.opposite,
}


def draw(rng: Random, names: Sequence[str], *, held_out: bool) -> Task:
    """One task of one of the named families, from one side of the split; its `id` is still empty."""
    while True:
        family = rng.choice(names)
        phrasing = rng.randrange(PHRASINGS)
        instruction, input, output, answer = FAMILIES[family](rng, phrasing)
        if is_held_out(instruction, input) == held_out:
            return {
                "id": "",
                "family": family,
                "phrasing": phrasing,
                "instruction": instruction,
                "input": input,
                "output": output,
                "answer": answer,
            }


def distinct(rng: Random, count: int, *, held_out: bool, label: str) -> Iterator[Task]:
    """`count` tasks with different prompts, the families in turn; ids are `label` and a number.

    A family is skipped for a turn when twenty samples in a row gave no new prompt.
    """
    seen: set[tuple[str, str]] = set()
    names = list(FAMILIES)
    turn = 0
    while len(seen) < count:
        for _ in range(20):
            task = draw(rng, [names[turn % len(names)]], held_out=held_out)
            key = task["instruction"], task["input"]
            if key not in seen:
                task["id"] = f"{label}-{len(seen):05d}"
                seen.add(key)
                yield task
                break
        turn += 1
