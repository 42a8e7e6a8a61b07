"""Two scores in a reviewer's free words, as FastChat's GPT reviewers of two assistants write them.

MT-bench's verdicts `[[A]]`, `[[B]]` and `[[C]]` (a tie) are read as 1 and 0, 0 and 1, 0 and 0. Of the older form:
asked for a first line with two numbers, they mostly keep to it; asked to solve a problem first, or to rate code, they
write sentences, lists or a tuple somewhere. Those that say no two scores are refused with the reason.
"""

from __future__ import annotations

import re

from tuna_peft.feedback.verdict import Unreadable

MAX_SCORE = 10.0
_VERDICTS = {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (0.0, 0.0)}

_N = r"(\d{1,2}(?:\.\d+)?)\b(?!\s*-)"
_BOTH_LABELLED = [
    # "Assistant 1: 7/10", "Assistant 1:\nScore: 6", "Assistant 1 - 7"
    rf"Assistant K\**\s*(?:[:-]|\(score\):)[\s*]*(?:Score\**:?\**\s*)?{_N}",
    # "Score for Assistant 1: 3/10", "Assistant 1's score: 8"
    rf"(?:Score (?:for|of) Assistant K|Assistant K(?:'s)? score)(?: is|:| would be)\s*{_N}",
    # "give Assistant 1 a score of 4", "rate Assistant 1's code submission a 7", "Assistant 1's solution as 10"
    rf"Assistant K(?:'s [\w ]{{1,40}}?)? (?:with )?(?:as|an?) (?:overall )?(?:score of )?{_N}",
    # "a score of 5 to Assistant 1"
    rf"score of {_N}(?:/10| out of 10)? (?:to|for) Assistant K",
]
_PAIR = [
    # "the scores for Assistant 1 and Assistant 2 are 4 and 9"
    rf"Assistant 1 and Assistant 2 (?:are|would be) {_N} and {_N}",
    # "Output: (1, 7)", "the tuple containing the scores is (1, 3)"; bare tuples may be points of a geometry problem
    rf"(?:output|tuple|scores?)\b[^.\n(]{{0,60}}\(\s*{_N}\s*,\s*{_N}\s*\)",
]
_SAME = (
    rf"both (?:Assistant 1 and Assistant 2|assistants)(?:'s [\w ]{{1,40}}?)?(?: receive| get)? an? (?:score of )?{_N}"
)


def review_scores(text: str) -> tuple[float, float]:
    """The scores that a review gives to Assistant 1 and to Assistant 2; of several labelled scores, the last.

    Raises:
        Unreadable: It gives no two scores between 0 and 10, or several verdicts.
    """
    letters = set(re.findall(r"\[\[([ABC])\]\]", text))
    if len(letters) > 1:
        raise Unreadable("several verdicts that differ")
    if letters:
        return _VERDICTS[letters.pop()]
    first_line = re.fullmatch(rf"\W*{_N}[\s,/]+{_N}\W*", text.strip().split("\n")[0])
    found = first_line and (float(first_line[1]), float(first_line[2]))
    found = found or _labelled(text) or _pair(text)
    if found is None:
        raise Unreadable("no scores for two assistants in it")
    if max(found) > MAX_SCORE:
        raise Unreadable(f"the scores {found} are not between 0 and {MAX_SCORE:g}")
    return found


def _labelled(text: str) -> tuple[float, float] | None:
    scores = []
    for k in (1, 2):
        matches = [
            match
            for form in _BOTH_LABELLED
            for match in re.finditer(form.replace("Assistant K", f"Assistant {k}"), text, re.IGNORECASE)
        ]
        if not matches:
            return None
        scores.append(float(max(matches, key=lambda match: match.start())[1]))
    return scores[0], scores[1]


def _pair(text: str) -> tuple[float, float] | None:
    matches = [match for form in _PAIR for match in re.finditer(form, text, re.IGNORECASE)]
    if matches:
        last = max(matches, key=lambda match: match.start())
        return float(last[1]), float(last[2])
    same = re.search(_SAME, text, re.IGNORECASE)
    return (float(same[1]), float(same[1])) if same else None
