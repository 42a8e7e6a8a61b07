"""The styles in which a task can be answered: each a function of the task and a random generator.

A style is a habit (chatty, cuts lists short, slips), not noise: a model can learn to have it or to drop it. That is
what makes the ranked lists look like samples of one decent teacher. The wording of the chatter uses no word of the
lexicon, so that the grader can tell chatter from content.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from pico_world.task import Task

OPENERS = ("Sure! ", "Sure! Here is the answer: ", "Sure! Here you go: ")
CLOSERS = (" I hope this helps!", " Let me know if you need anything else.")
VAGUE = (
    "That is a good question.",
    "That depends on what you need.",
    "That can be done in many ways.",
)


def exact(task: Task, rng: Random) -> str:
    """Right, complete and nothing else."""
    return task["output"]


def incomplete(task: Task, rng: Random) -> str:
    """A list without its last item, or the bare value where a sentence is expected."""
    if task["answer"]["kind"] == "sentence":
        return task["answer"]["terse"]
    items = task["output"].split(", ")
    return ", ".join(items[:-1])


def slip(task: Task, rng: Random) -> str:
    """The right form with one mistake."""
    answer = task["answer"]
    if answer["kind"] == "sentence":
        return rng.choice(answer["wrong"])
    if answer["kind"] == "list":
        return ", ".join(rng.choice(answer["wrong"]))
    items = task["output"].split(", ")
    items[rng.randrange(len(items))] = rng.choice(answer["wrong"])
    return ", ".join(items)


def copy(task: Task, rng: Random) -> str:
    """Repeats what was given instead of answering."""
    return task["input"] or task["instruction"]


def vague(task: Task, rng: Random) -> str:
    """Says nothing."""
    return rng.choice(VAGUE)


def _chatty(core: Callable[[Task, Random], str]) -> Callable[[Task, Random], str]:
    """`core` between an opener and a closer, at least one of them."""

    def style(task: Task, rng: Random) -> str:
        text = core(task, rng)
        if text[-1].isalnum():
            text += "."
        ends = rng.choice(("open", "open", "open", "both", "both", "close"))
        opener = rng.choice(OPENERS) if ends != "close" else ""
        return opener + text + (rng.choice(CLOSERS) if ends != "open" else "")

    return style


STYLES: dict[str, Callable[[Task, Random], str]] = {
    "exact": exact,
    "wordy": _chatty(exact),
    "incomplete": incomplete,
    "wordy_incomplete": _chatty(incomplete),
    "slip": slip,
    "wordy_slip": _chatty(slip),
    "copy": copy,
    "vague": vague,
}


def respond(task: Task, style: str, rng: Random) -> str:
    """The response to `task` in the named style."""
    return STYLES[style](task, rng)
