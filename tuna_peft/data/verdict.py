"""Reads the ranking from a judge's answer, or gives the reason why there is none. Nothing is guessed.

Used by `feedback`, and by `readers` for the reference project's records. Two forms are read: the JSON object that
`tuna_peft.feedback.protocol` asks for, anywhere in the text, and the plain text of the reference
code ("Response 0: 12 ... rank: [2, 0, 1, 4]"). Both number responses from 0 in the order shown.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from tuna_peft.data.ranked import dense_ranks

# Each response is graded on three aspects, with whole numbers from 0.
ASPECTS, MAX_GRADE = 3, 5

MAX_CHARACTERS = 200_000
"""Maximum length of an answer; no verdict is that long."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's ranking of the responses, which are numbered in the order shown.

    Args:
        ranks: Dense ranks from 0, equal for responses that the judge calls duplicates.
        own_response: The judge's own response; None if it gave none.
        own_is_best: Whether the judge gave a response of its own and ranks it above all others, or does not rank it.
        kind: `open-ended`, `closed-ended` or None.
        order: The numbers as ranked, best first; the judge's own response has the next number after the last one.
    """

    ranks: list[int]
    own_response: str | None = None
    own_is_best: bool = False
    kind: str | None = None
    order: tuple[int, ...] = ()


class Unreadable(ValueError):
    """The text contains no ranking that can be trusted; the message says why."""


def read_verdict(text: str, responses: int) -> Verdict:
    """Reads a judge's answer about `responses` responses.

    Raises:
        Unreadable: No ranking, several different ones, numbers out of range or named twice, responses neither ranked
            nor called duplicates, grades out of range or against the ranking.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"{len(text)} characters are too many")
    # A reasoning model's thoughts are not its answer.
    text = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    objects = [value for value in _json_objects(text) if "rank" in value]
    if not objects and re.search(r'"rank"\s*:', text):
        raise Unreadable("incomplete JSON")
    verdicts = [_read_object(value, responses) for value in objects] or [_read_plain(text, responses)]
    if any(verdict.ranks != verdicts[0].ranks for verdict in verdicts):
        raise Unreadable("several rankings that differ")
    return verdicts[-1]


# The JSON form

_STRAY_BRACES = 500


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text; objects inside them, such as quoted ones, are ignored."""
    decoder, position, stray = json.JSONDecoder(), 0, 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            position, stray = position + 1, stray + 1
            if stray > _STRAY_BRACES:  # each one costs a scan of the whole text
                raise Unreadable("too many braces that do not begin an object") from None
        except RecursionError:
            raise Unreadable("JSON that is nested too deeply") from None
        else:
            if isinstance(value, dict):
                yield value


def _read_object(value: dict[str, Any], responses: int) -> Verdict:
    order = [_number(entry, responses) for entry in _list(value["rank"], "rank")]
    groups = [
        [_number(entry, responses) for entry in _list(group, "duplicates")]
        for group in _list(value.get("duplicates") or [], "duplicates")
    ]
    totals: dict[int, float] = {}
    for entry in _list(value.get("grades") or [], "grades"):
        number, total = _graded(entry, responses)
        if number in totals:
            raise Unreadable(f"response {number} is graded twice")
        totals[number] = total
    own, kind = value.get("own_response"), value.get("kind")
    return _verdict(
        order,
        groups,
        totals,
        responses,
        own=own if isinstance(own, str) and own.strip() else None,
        kind=kind if kind in ("open-ended", "closed-ended") else None,
    )


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unreadable(f"`{name}` is not a list")
    return value


def _number(value: Any, responses: int) -> int:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(?:response\s*)?(\d{1,3})\s*", value, re.IGNORECASE)):
        value = int(match[1])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= responses:
        raise Unreadable(f"{value!r:.40} is not a number from 0 to {responses}")
    return value


def _graded(entry: Any, responses: int) -> tuple[int, float]:
    if not isinstance(entry, dict):
        raise Unreadable("an entry of `grades` is not an object")
    aspects = _list(entry.get("aspects"), "aspects")
    sound = len(aspects) == ASPECTS and all(
        isinstance(grade, (int, float)) and not isinstance(grade, bool) and 0 <= grade <= MAX_GRADE
        for grade in aspects
    )
    if not sound:
        raise Unreadable(f"the grades {aspects!r:.60} are not {ASPECTS} numbers from 0 to {MAX_GRADE}")
    return _number(entry.get("response"), responses), float(sum(aspects))


# The plain text of the reference code

_RANK = re.compile(
    r"^[^\w\n]*(?:final\s+)?(?:rank(?:ing|s)?|from best to worst)[^\w\n\[]*:[\s*_`]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_TOTAL = re.compile(
    r"^[^\w\n]*response\s+(\d{1,3})\W*?:\W*?(\d{1,2}(?:\.\d+)?)(?:\s*/\s*15)?[\]\s*.,;]*$",
    re.IGNORECASE | re.MULTILINE,
)
# What follows the judge's own response: a heading, the next step, or a sentence about duplicates.
_NEXT_PART = re.compile(
    r"^(?:\s*#+\s*(?:Response|Rating|Score|Rank|Duplicate|Step|Evaluation|Comparison)\b|[^\w\n]*(?:(?:Third|Fourth|Fifth"
    r"|Lastly|Last|Finally)\b[,:]|Step \d|(?:Ratings?|Scores?|Overall scores?|Duplicates?)\W*:\W*$)"
    r"|.*\bduplicates?\b.*\bresponses?\b|.*\bresponses?\b.*\bduplicates?\b)",
    re.IGNORECASE | re.MULTILINE,
)
_SAME = re.compile(r"[^.\n]*\b(?:duplicates?|identical)\b[^.\n]*", re.IGNORECASE)


def _read_plain(text: str, responses: int) -> Verdict:
    lines = [match[1].strip() for match in _RANK.finditer(text)]
    if not lines:
        raise Unreadable("no ranking in the answer")
    orders = [_plain_order(line, responses) for line in lines]
    if any(order != orders[0] for order in orders):
        raise Unreadable("several rankings that differ")
    totals: dict[int, float] = {}
    for number, total in ((int(match[1]), float(match[2])) for match in _TOTAL.finditer(text)):
        if number > responses or total > ASPECTS * MAX_GRADE or totals.get(number, total) != total:
            raise Unreadable(f"the total {total:g} of response {number} is impossible")
        totals[number] = total
    # Sentences are used only to explain why a number is missing from the ranking.
    missing = set(range(responses)) - set(orders[0])
    groups = [group for group in _plain_groups(text, responses) if missing & set(group)]
    return _verdict(orders[0], groups, totals, responses, own=own_response(text, responses))


def own_response(text: str, number: int) -> str | None:
    """The judge's own response in the plain form: all of its paragraphs, up to the next part of the answer.

    Args:
        text: The judge's answer.
        number: The number of its own response, after the last one that it was shown.
    """
    begin = re.search(rf"#+\s*Response {number}\s*:", text, re.IGNORECASE)
    if begin is None:
        return None
    rest = text[begin.end() :]
    ends = [match.start() for part in (_TOTAL, _RANK, _NEXT_PART) if (match := part.search(rest))]
    return rest[: min(ends, default=len(rest))].strip() or None


def _plain_order(line: str, responses: int) -> list[int]:
    """`[2, 0, 1]`, `2 > 0 > 1` or `Response 2 > Response 0`; anything else on the line is an error."""
    bare = re.sub(r"response\s*", "", line.rstrip("*_`. "), flags=re.IGNORECASE)
    # A remark may follow the list, such as "(out of 15)".
    remark = r"(?:\([^\[\]()]*\)|[.;]\s[^\[\]]*)?\W*"
    match = re.fullmatch(rf"\[\s*([^\[\]]*?)\s*\]\W*{remark}", bare) or re.fullmatch(r"(\d+(?:\s*[>,]\s*\d+)+)", bare)
    parts = re.split(r"\s*[>,]\s*", match[1]) if match else []
    if not parts or not all(re.fullmatch(r"\d{1,3}", part) for part in parts):
        raise Unreadable(f"the ranking {line!r:.60} is not a list of numbers")
    return [_number(int(part), responses) for part in parts]


def _plain_groups(text: str, responses: int) -> list[list[int]]:
    """Numbers that one sentence calls duplicates ("Response 1 and 3 are duplicates")."""
    groups = []
    for match in _SAME.finditer(text):
        sentence = re.sub(r"rank\w*\W*:.*", "", match[0], flags=re.IGNORECASE)
        numbers = list(dict.fromkeys(int(digits) for digits in re.findall(r"\b\d{1,3}\b", sentence)))
        if len(numbers) > 1 and max(numbers) <= responses and not re.search(r"\bno\b|\bnot\b|n't\b", sentence):
            groups.append(numbers)
    return groups


# Common to both


def _verdict(
    order: list[int],
    groups: list[list[int]],
    totals: dict[int, float],
    responses: int,
    *,
    own: str | None,
    kind: str | None = None,
) -> Verdict:
    if len(set(order)) < len(order):
        raise Unreadable(f"the ranking {order} names a response twice")
    for better, worse in zip(order, order[1:]):  # noqa: B905 - neighbours
        if totals.get(better, 0.0) < totals.get(worse, 0.0) and better in totals:
            raise Unreadable(f"the ranking {order} contradicts the grades of {better} and {worse}")
    place: dict[int, float] = {number: float(position) for position, number in enumerate(order)}
    for group in groups:
        ranked = sorted(place[number] for number in group if number in place)
        if ranked and ranked[-1] - ranked[0] > len(ranked) - 1:
            raise Unreadable(f"the duplicates {group} are not next to each other in the ranking {order}")
        for number in group:
            if ranked:
                place[number] = ranked[0]
    missing = [number for number in range(responses) if number not in place]
    if missing:
        raise Unreadable(f"response {missing[0]} is neither in the ranking {order} nor a duplicate of one that is")
    places = [place[number] for number in range(responses)]
    return Verdict(
        ranks=dense_ranks(places),
        own_response=own,
        own_is_best=own is not None and place.get(responses, -1.0) < min(places),
        kind=kind,
        order=tuple(order),
    )
