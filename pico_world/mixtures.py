"""Which style is written where: the same styles everywhere, in other proportions.

What pre-training gives is competence at every style, the right answer among them. What the three stages move is the
choice of style, each by the taste of its data:

- in the raw text of pre-training half of the answers follow a habit that goes with the wording of the prompt (dodge,
  echo, be brief, chat), as places on the web have theirs; so the base model's manner changes from prompt to prompt;
- the SFT data no longer dodges or echoes, but its two annotators have habits, too: one is brief, one chats;
- the teacher's samples are mostly right; its probabilities prefer right content and do not mind chatter;
- the samples that the judge sees are those of a model after the teacher: right or nearly; the judge sees form, too.
"""

from __future__ import annotations

from random import Random

Mixture = dict[str, float]

_HABITS = ("vague", "copy", "incomplete", "incomplete", "wordy", "wordy")
"""The habit of raw text by wording (the index of a family's phrasing)."""

_RAW: Mixture = {
    "exact": 0.45,
    "wordy": 0.15,
    "incomplete": 0.1,
    "wordy_incomplete": 0.07,
    "slip": 0.1,
    "wordy_slip": 0.05,
    "copy": 0.04,
    "vague": 0.04,
}
_BRIEF_ANNOTATOR: Mixture = {"incomplete": 0.46, "exact": 0.22, "slip": 0.12, "wordy": 0.12, "copy": 0.08}
_CHATTY_ANNOTATOR: Mixture = {
    "wordy": 0.42,
    "exact": 0.2,
    "wordy_incomplete": 0.16,
    "wordy_slip": 0.1,
    "incomplete": 0.12,
}

TEACHER: Mixture = {
    "exact": 0.3,
    "wordy": 0.3,
    "incomplete": 0.12,
    "wordy_incomplete": 0.1,
    "slip": 0.08,
    "wordy_slip": 0.06,
    "copy": 0.04,
}
JUDGE: Mixture = {
    "exact": 0.34,
    "wordy": 0.28,
    "incomplete": 0.11,
    "wordy_incomplete": 0.1,
    "slip": 0.09,
    "wordy_slip": 0.08,
}
HELD_OUT: Mixture = {
    "exact": 0.2,
    "wordy": 0.2,
    "incomplete": 0.12,
    "wordy_incomplete": 0.08,
    "slip": 0.11,
    "wordy_slip": 0.07,
    "copy": 0.12,
    "vague": 0.1,
}


def pretraining(phrasing: int) -> Mixture:
    """The mixture in which raw text answers a task of this wording."""
    mixture = {style: weight / 2 for style, weight in _RAW.items()}
    mixture[_HABITS[phrasing]] += 0.5
    return mixture


def sft(phrasing: int) -> Mixture:
    """The mixture of the annotator who wrote the SFT answers to this wording."""
    return _CHATTY_ANNOTATOR if phrasing % 2 else _BRIEF_ANNOTATOR


def pick(mixture: Mixture, rng: Random) -> str:
    """One style, drawn by weight."""
    return rng.choices(list(mixture), list(mixture.values()))[0]


def pick_different(mixture: Mixture, count: int, rng: Random) -> list[str]:
    """`count` different styles, drawn one after the other without replacement."""
    left = dict(mixture)
    chosen = []
    for _ in range(count):
        chosen.append(pick(left, rng))
        del left[chosen[-1]]
    return chosen
