"""The record of one task, the same in every data file and in the grader."""

from __future__ import annotations

from typing import Any, TypedDict


class Task(TypedDict):
    """One task; `phrasing` says which of its family's wordings the instruction uses.

    `answer` is what the grader and the styles need to know. Its `kind` is one of

    - `"list"`: `items` in the right order, `wrong` (lists that look right), the `output` is the items alone;
    - `"members"`: any `count` different words of `pool`; `wrong` holds words that do not belong;
    - `"sentence"`: the right `value` in a short sentence, `wrong` (whole sentences with another value),
      `terse` (the bare reply), `claims` (the key in `lexicon.CLAIMS` of the words that can be claimed) and `claim`
      ("first" or "last": which of these words in a sentence is the claim).
    """

    id: str
    family: str
    phrasing: int
    instruction: str
    input: str
    output: str
    answer: dict[str, Any]
