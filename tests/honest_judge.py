"""Prompts whose responses say how good they are, and judges behind a scripted server that read it."""

from __future__ import annotations

import json
import re

from scripted_server import chat


def rows(count, responses=4):
    """Prompts whose responses say how good they are."""
    return [
        {"id": str(i), "prompt": f"Prompt {i}?", "completions": [f"grade {(i + 3 * k) % 7}" for k in range(responses)]}
        for i in range(count)
    ]


def shown(asked):
    """The responses that a request quotes, in the order in which it does."""
    mark = re.search(r"lines that begin with (#[0-9a-f]{16})", asked.text)[1]
    return re.findall(rf"{mark} response \d+ begins\n(.*?)\n{mark} response \d+ ends", asked.text, re.DOTALL)


def grade(text):
    return int(re.search(r"grade (\d)", text)[1])


def verdict(asked, *, own="the best", reverse=False, **fields):
    """A judge that reads the grades."""
    texts = shown(asked)
    order = sorted(range(len(texts)), key=lambda i: (-grade(texts[i]), i), reverse=reverse)
    return json.dumps({"kind": "closed-ended", "own_response": own, "rank": [len(texts), *order], **fields})


def honest(asked):
    return chat(verdict(asked))


def first_shown_wins(asked):
    n = len(shown(asked))
    return chat(json.dumps({"rank": list(range(n))}))
