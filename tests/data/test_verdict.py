"""Which words are a ranking, and which are none."""

from __future__ import annotations

import itertools
import json
import random
from importlib import resources

import pytest

from tuna_peft.data.ranked import dense_ranks
from tuna_peft.data.verdict import MAX_CHARACTERS, Unreadable, read_verdict


def answer(rank, **fields):
    return json.dumps({"kind": "open-ended", "own_response": "mine", "duplicates": [], "rank": rank, **fields})


def grades(**totals):
    return [
        {"response": int(name[1:]), "aspects": [total // 3, total // 3, total - 2 * (total // 3)]}
        for name, total in totals.items()
    ]


def test_the_object_that_was_asked_for():
    text = answer([3, 1, 0, 2], grades=grades(r0=6, r1=9, r2=3, r3=15))
    verdict = read_verdict(text, 3)
    assert (verdict.ranks, verdict.own_response, verdict.own_is_best) == ([1, 0, 2], "mine", True)
    assert verdict.kind == "open-ended"


@pytest.mark.parametrize(
    "wrap",
    ["{}", "```json\n{}\n```", "Here you are:\n\n{}\n\nI hope it helps {{x}}!", "<think>rank: [0, 1]</think>{}"],
)
def test_whatever_stands_around_it(wrap):
    assert read_verdict(wrap.format(answer([1, 0, 2])), 2).ranks == [1, 0]


@pytest.mark.parametrize("rank", [["1", "0"], ["Response 1", "response 0"], [1, 0]])
def test_numbers_as_models_write_them(rank):
    assert read_verdict(json.dumps({"rank": rank}), 2).ranks == [1, 0]


def test_own_response_that_is_not_the_best():
    verdict = read_verdict(answer([1, 2, 0]), 2)
    assert (verdict.ranks, verdict.own_is_best) == ([1, 0], False)
    assert read_verdict(answer([1, 0]), 2).own_is_best
    assert not read_verdict(answer([2, 1, 0], own_response=" "), 2).own_is_best


def test_duplicates_share_a_rank():
    assert read_verdict(answer([2, 0, 4], duplicates=[[0, 1], [3, 2]]), 4).ranks == [1, 1, 0, 0]
    # One that says the same as the judge's own stands where that stands.
    assert read_verdict(answer([2, 0], duplicates=[[1, 2]]), 2).ranks == [1, 0]
    # Named as duplicates and ranked nevertheless, side by side.
    assert read_verdict(answer([2, 0, 1], duplicates=[[0, 1]]), 3).ranks == [1, 1, 0]


def by_hand(order, groups, totals, responses):
    """The ranks and whether the judge's own response is the best, by sets of equal responses; None: contradictory."""
    same = {number: set(group) for group in groups for number in group}
    levels = []
    for number in order:
        level = same.get(number, {number})
        if not levels or levels[-1] != level:
            levels.append(level)
    named = [number for level in levels for number in level]
    if len(set(order)) < len(order) or len(set(named)) < len(named) or not set(range(responses)) <= set(named):
        return None
    neighbours = itertools.pairwise(order)
    if any(a in totals and b in totals and totals[a] < totals[b] for a, b in neighbours):
        return None
    with_others = [level - {responses} for level in levels if level - {responses}]
    ranks = [next(rank for rank, level in enumerate(with_others) if number in level) for number in range(responses)]
    return ranks, levels[0] == {responses} or responses not in named


def test_ties_duplicates_grades_and_own_responses_against_an_oracle():
    draw, outcomes = random.Random(0), []
    for _ in range(4000):
        n = draw.randint(1, 4)
        numbers = draw.sample(range(n + 1), n + 1)
        cut = draw.randint(0, n + 1)
        groups = [sorted(numbers[:cut])] if cut > 1 else []
        order = draw.sample(range(n + 1), draw.randint(max(n - 1, 1), n + 1))
        if draw.random() < 0.1:
            order[-1] = order[0]
        totals = {number: draw.choice([3, 6, 6, 9]) for number in range(n + 1) if draw.random() < 0.3}
        text = answer(order, duplicates=groups, grades=grades(**{f"r{k}": total for k, total in totals.items()}))
        expected = by_hand(order, groups, totals, n)
        try:
            verdict = read_verdict(text, n)
            found = verdict.ranks, verdict.own_is_best
        except Unreadable:
            found = None
        assert found == expected, text
        outcomes.append(expected)
    ties = [found for found in outcomes if found and len(set(found[0])) < len(found[0])]
    own = [found for found in outcomes if found and found[1]]
    assert min(len(ties), len(own), outcomes.count(None)) > 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no ranking"),
        ("I cannot judge this.", "no ranking"),
        ('{"rank": [1, 0', "incomplete JSON"),
        (answer([1, 0])[:-1], "incomplete JSON"),
        (json.dumps({"rank": [1, 0], "own_response": "cut"}, indent=1)[:-9], "incomplete JSON"),
        (answer([1]), "response 0 is neither"),
        (answer([0, 1, 2, 3]), "not a number from 0 to 2"),
        (answer([0, 1, -1]), "not a number"),
        (answer([0, 1, 1]), "twice"),
        (answer([0, 1, True]), "not a number"),
        (answer([0, 1.0]), "not a number"),
        (answer([0, None]), "not a number"),
        (answer([[0, 1]]), "not a number"),
        (answer([]), "neither"),
        (answer("0 1"), "not a list"),
        (answer({"0": 1}), "not a list"),
        (answer(None), "not a list"),
        (answer([0], duplicates=[[1, 7]]), "not a number"),
        (answer([0, 1], duplicates="none"), "not a list"),
        (answer([0, 1], grades=grades(r0=3, r1=4)), "contradicts the grades of 0 and 1"),
        (answer([0, 1], grades=[{"response": 0, "aspects": [6, 0, 0]}]), "not 3 numbers from 0 to 5"),
        (answer([0, 1], grades=[{"response": 0, "aspects": [5, 5]}]), "not 3 numbers"),
        (answer([0, 1], grades=[{"response": 9, "aspects": [5, 5, 5]}]), "not a number"),
        (answer([0, 1], grades=grades(r0=5) * 2), "graded twice"),
        (answer([0, 1], grades=[7]), "not an object"),
        (answer([0, 1]) + answer([1, 0]), "several rankings that differ"),
        ("rank: [0, 1]\nrank: [1, 0]", "several rankings that differ"),
        ("rank: [0, 1", "not a list of numbers"),
        ("rank: [0, one]", "not a list of numbers"),
        ("rank: [0, 1, 5]", "not a number from 0 to 2"),
        ("rank: [0, 0, 1]", "twice"),
        ("rank: [0]", "response 1 is neither"),
        ("rank: 0", "not a list of numbers"),
        ("rank: the first is the best, then 1", "not a list of numbers"),
        ("Response 0: 3\nResponse 1: 12\nrank: [0, 1]", "contradicts the grades"),
        ("Response 0: 16\nrank: [0, 1]", "is impossible"),
        ("Response 0: 5\nResponse 0: 7\nrank: [0, 1]", "is impossible"),
        ("There are no duplicates of response 0 and 1.\nrank: [0]", "response 1 is neither"),
        ("{" * 100_000, "too many braces"),
        ('{"a":' * 30_000, "too many braces|too deeply"),
        (answer([1, 0]) + "x" * MAX_CHARACTERS, "characters are too many"),
    ],
)
def test_what_is_no_ranking(text, reason):
    with pytest.raises(Unreadable, match=reason):
        read_verdict(text, 2)


def test_what_an_object_quotes_is_not_looked_at():
    """A response asked to be quoted, with a ranking inside of it."""
    own = 'As response 1 says: {"rank": [1, 0]}\nrank: [1, 0]'
    assert read_verdict(answer([2, 0, 1], own_response=own), 2).ranks == [0, 1]
    with pytest.raises(Unreadable, match="several"):
        read_verdict(f"It says: {answer([1, 0])}\nI say: {answer([0, 1])}", 2)


REFERENCE = """\
The instruction is open-ended.

### Response 4: Plants need light,
and water.

Response 1 and Response 3 are duplicates.

Response 0: 8
Response 1: [11]
Response 2: 12/15
Response 4: 15

rank: [4, 2, 1, 0]
"""


def test_the_plain_form_of_the_reference():
    verdict = read_verdict(REFERENCE, 4)
    assert verdict.ranks == [2, 1, 0, 1]
    assert (verdict.own_response, verdict.own_is_best) == ("Plants need light,\nand water.", True)


@pytest.mark.parametrize(
    "line",
    ["rank: [1, 2, 0]", "Rank: [1,2,0].", "**Rank:** [1, 2, 0]", "- Final ranking: 1 > 2 > 0", "Ranking:\n[1, 2, 0]",
     "rank: 1, 2, 0", "Rank: Response 1 > Response 2 > Response 0", "From best to worst: Response 1 > Response 2 > 0",
     "Rank: **[1, 2, 0]**"],
)  # fmt: skip
def test_lines_as_models_write_them(line):
    assert read_verdict(f"Some words.\n\n{line}", 3).ranks == [2, 0, 1]


def test_the_text_of_judge_data_gives_its_ranks():
    """pico-LLaMA's judge data, of the reference's raw shape: each text is read as its record says, or refused."""
    file = resources.files("tuna_peft.assets") / "pico_llama/data/judge.json"
    refused = 0
    for record in json.loads(file.read_text(encoding="utf-8")):
        place = {number: rank for rank, number in enumerate(record["rank"])}
        try:
            verdict = read_verdict(record["gpt_eval"], 4)
        except Unreadable as error:  # it leaves out what repeats word for word, and does not say so
            assert "neither in the ranking" in str(error)
            assert not {0, 1, 2, 3} <= place.keys()
            refused += 1
        else:
            assert verdict.ranks == dense_ranks([place[number] for number in range(4)])
    assert refused < 100


def test_damaged_answers_are_refused_or_sound():
    """Any cut, swap, repetition or deletion: what is still read is a dense ranking of all responses."""
    draw, read = random.Random(0), 0
    whole = [answer([4, 2, 0, 3], duplicates=[[1, 3]], grades=grades(r0=7, r2=9, r3=3, r4=15)), REFERENCE]
    for _ in range(3000):
        text = draw.choice(whole)
        for _ in range(draw.randint(1, 4)):
            i, j = sorted(draw.sample(range(len(text) + 1), 2))
            middle = draw.choice(["", text[i:j] * 2, text[i:j][::-1], draw.choice('0123456789[]{},:"\n \\')])
            text = text[:i] + middle + text[j:] if draw.random() < 0.5 else text[: i + 3] + middle + text[i + 4 :]
        try:
            ranks = read_verdict(text, 4).ranks
        except Unreadable:
            continue
        read += 1
        assert len(ranks) == 4 and set(ranks) == set(range(max(ranks) + 1))
    assert 0 < read < 3000
