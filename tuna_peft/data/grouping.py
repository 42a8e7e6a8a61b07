"""Rows about the same prompt become one ranked list: rated responses, or comparisons of two. Used by `load`.

A *vote* is `(i, j, sign)`: with a positive sign response i is better than response j, with a negative one j is better
than i, with 0 they are tied.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import operator
import pickle
import re
import sqlite3
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import DataSource
from tuna_peft.data.ranked import Record, dense_ranks, number

Vote = tuple[int, int, float]

_TIE = re.compile(
    r"(ties?|tied|draw|equal|both|neither|same|no[ _-]preference)(?![a-z]).*|both(bad|good)|=+", re.IGNORECASE
)
_COMPARED = re.compile(r"([a-z])\s*(?:(>+)|(<+)|=+)\s*([a-z])")
_NAME = re.compile(
    r"(?:(?:model|response|answer|output|completion|assistant|option)[ _-]?)?(?:([a-z])|(\d+)(?:\.0)?)"
    r"(?:[ _-](?:wins|(?:is[ _-])?(?:(?:much|far|clearly|significantly|slightly|somewhat)[ _-])?better))?"
)
_WORDS = {"first": 0, "left": 0, "second": 1, "right": 1}


class Group(dict[str, Any]):
    """The rows about one prompt: as a record it is the first of them.

    Attributes:
        rows: Place and record of each.
    """

    rows: list[tuple[str, Record]]


def winner_index(label: Any, completions: list[Any], labels: dict[str, Any] | None, where: str) -> int | None:
    """The index of the response that a label names as the best, or None for a tie.

    Args:
        label: `model_a`, `B`, `response 2`, 1 (the first), `A>B`, `tie`, or the text of a response; or a key of
            `labels`.
        completions: The responses.
        labels: What other labels mean: an index from 0, or `tie`.
        where: The record's place, for errors.

    Raises:
        BadRow: The label is unknown.
    """
    if label is None:
        raise BadRow("the label of the best response is missing (null)", reason="no label", where=where)
    word = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()
    meant = {key.casefold(): meaning for key, meaning in (labels or {}).items()}.get(word.casefold())
    index: int | None = None
    if meant is not None:
        if meant == "tie":
            return None
        index = meant
    elif _TIE.fullmatch(word):
        return None
    elif labels is None:
        word = word.strip("[]().")  # [[A]], as judges of MT-Bench write
        if compared := _COMPARED.fullmatch(word.lower()):
            if not compared[2] and not compared[3]:
                return None
            word = compared[1] if compared[2] else compared[4]
        match = _NAME.fullmatch(word.lower())
        if match and match[1]:
            index = ord(match[1]) - ord("a")
        elif match:
            index = int(match[2]) - 1  # -1 for 0, which is a tie in some data sets and the second response in others
        else:
            index = _WORDS.get(word.lower())
    if (index is None or index >= len(completions)) and label in completions:
        index = completions.index(label)
    if index is None or not 0 <= index < len(completions):
        raise BadRow(
            f"the label {word[:40]!r} does not say which of {len(completions)} responses is the best",
            reason="unknown label",
            where=where,
            fix="Say what the labels mean, in `columns`, with indices from 0: `winner_labels: "
            f"{{{word[:40]}: 0, ...: 1}}` if this one is the first response, `tie` for a tie.",
        )
    return index


def votes_for(winner: int | None, count: int) -> list[Vote]:
    """Votes that put one of `count` responses above each other one, or (None) tie them all."""
    if winner is None:
        return [(index, index + 1, 0.0) for index in range(count - 1)]
    return [(winner, index, 1.0) for index in range(count) if index != winner]


def rank_by_votes(count: int, votes: list[Vote]) -> tuple[list[int | None], int]:
    """Ranks that agree with every vote that no other one contradicts.

    The majority decides about a pair, and a draw is a tie. Responses that the pairs put in a circle (a over b, b over
    c, c over a) are tied. The rank of a response is the length of the longest chain of better ones above it. Responses
    without a vote are not ranked.

    Args:
        count: Number of responses.
        votes: Comparisons of pairs of them.

    Returns:
        Dense ranks, equal where tied, None where not ranked; and the number of votes that the ranks contradict.
    """
    balance: dict[tuple[int, int], int] = defaultdict(int)
    for i, j, sign in votes:
        balance[min(i, j), max(i, j)] += (sign > 0) - (sign < 0) if i < j else (sign < 0) - (sign > 0)
    # reach[i] holds the responses that are no better than i: i beats them or ties with them, perhaps through others.
    reach = [{i} for i in range(count)]
    for (i, j), sign in balance.items():
        if sign >= 0:
            reach[i].add(j)
        if sign <= 0:
            reach[j].add(i)
    for via in range(count):
        for i in range(count):
            if via in reach[i]:
                reach[i] |= reach[via]
    same = [frozenset(j for j in reach[i] if i in reach[j]) for i in range(count)]
    levels: dict[frozenset[int], int] = {}
    for i in sorted(range(count), key=lambda i: -len(reach[i])):  # the better one reaches more
        better = {same[j] for j in range(count) if i in reach[j]} - {same[i]}
        levels[same[i]] = max((levels[group] + 1 for group in better), default=0)
    voted = {i for vote in votes for i in vote[:2]}
    ranks = [levels[same[i]] if i in voted else None for i in range(count)]
    steps = [(levels[same[j]] - levels[same[i]], sign) for i, j, sign in votes]
    wrong = sum((step > 0) - (step < 0) != (sign > 0) - (sign < 0) for step, sign in steps)
    return ranks, wrong


def group_rows(records: Iterable[tuple[str, Record]], source: DataSource) -> Iterator[tuple[str, Record]]:
    """Collects rows with equal values at `group_by`, in the order in which the values first appear.

    Rows whose prompt, input or system message differ are never one group: their responses answer different questions.
    The rows of a prompt may stand anywhere, so all of them are sorted, in a temporary file of SQLite.

    Raises:
        BadRow: A row has no such path; with `on_bad_row: skip` only the first row must have it.
    """
    paths = [source.group_by] if isinstance(source.group_by, str) else source.group_by or []
    parts = [getattr(source.columns, part, part) for part in ("prompt", "instruction", "input", "system")]
    beside = [path for path in parts if path is not None and path not in paths]
    groups: dict[bytes, int] = {}

    def numbered() -> Iterator[tuple[int, bytes]]:
        for where, record in records:
            strict = not groups or source.on_bad_row == "error"
            values = [_at(record, path, where, strict) for path in paths]
            values += [_at(record, path, where, False) for path in beside]
            key = hashlib.sha256(json.dumps(values, default=str).encode("utf-8", "surrogatepass")).digest()
            yield groups.setdefault(key, len(groups)), pickle.dumps((where, record))

    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("CREATE TABLE rows (prompt INTEGER, row BLOB)")
        table.executemany("INSERT INTO rows VALUES (?, ?)", numbered())
        ordered = table.execute("SELECT prompt, row FROM rows ORDER BY prompt, rowid")
        for _, rows in itertools.groupby(ordered, key=operator.itemgetter(0)):
            placed = [pickle.loads(row) for _, row in rows]
            group = Group(placed[0][1])
            group.rows = placed
            yield placed[0][0], group


def _at(record: Record, path: str, where: str, strict: bool) -> Any:
    """The value at a path; where there is none an error, or None."""
    from tuna_peft.data.columns import one

    try:
        return one(record, path, where)
    except BadRow:
        if strict:
            raise
        return None


def merge_responses(rows: list[tuple[str, Record]]) -> Record:
    """The responses of several rows as one record.

    Rows with scores are joined, and a response that several rows rate has the mean of its scores. Rows that only
    compare their own responses (`votes`, or ranks of at least two) are ranked by `rank_by_votes`.

    Args:
        rows: Place, and `completions`, `scores`, `ranks`, `reference` and perhaps `votes`, of each row.

    Raises:
        BadRow: A row has no usable order.
    """
    texts: dict[str, int] = {}  # equal responses of several rows are one
    completions: list[Any] = []
    places: list[list[int]] = []
    for where, row in rows:
        entries = row["completions"]
        if not isinstance(entries, list) or not entries:
            raise BadRow("the record has no responses", reason="no responses", where=where)
        for entry in entries:
            key = json.dumps(entry, default=str)
            if key not in texts:
                texts[key] = len(completions)
                completions.append(entry)
        places.append([texts[json.dumps(entry, default=str)] for entry in entries])
    merged: Record = {
        "completions": completions,
        "scores": None,
        "ranks": None,
        "reference": next((row["reference"] for _, row in rows if row["reference"] is not None), None),
        "merged": sum(map(len, places)) - len(completions),
    }
    votes = [vote for (where, row), place in zip(rows, places, strict=True) for vote in _votes(row, place, where)]
    if votes:
        merged["ranks"], merged["contradictions"] = rank_by_votes(len(completions), votes)
        merged["comparisons"] = len(votes)
        return merged
    for name in ("scores", "ranks"):
        values: list[list[float]] = [[] for _ in completions]
        for (where, row), place in zip(rows, places, strict=True):
            given = [None] if row[name] == [] and len(place) == 1 else row[name] or []  # an empty cell
            for index, value in zip(place, given, strict=False):
                values[index].append(number(value, name.removesuffix("s"), where))
        if any(values):
            merged[name] = [statistics.fmean(one) if one else None for one in values]
    if merged["ranks"] is not None and None not in merged["ranks"]:
        merged["ranks"] = dense_ranks(merged["ranks"])
    return merged


def _votes(row: Record, place: list[int], where: str) -> list[Vote]:
    """The comparisons of a row, with the indices of the group's responses; none where it has scores."""
    votes = row.get("votes")
    if votes is None and row["scores"] is None and row["ranks"] is not None and len(place) > 1:
        ranks = [None if rank is None else number(rank, "rank", where) for rank in row["ranks"]]
        votes = [
            (i, j, other - rank)
            for i, rank in enumerate(ranks)
            for j, other in enumerate(ranks)
            if i < j and rank is not None and other is not None
        ]
    return [(place[i], place[j], sign) for i, j, sign in votes or [] if place[i] != place[j]]
