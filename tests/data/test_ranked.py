"""Normalisation: order, ranks, duplicates, and every kind of bad record."""

import random

import pytest

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.ranked import ReadReport, add_reference, dense_ranks, normalise

NAN, INF = float("nan"), float("inf")


def record(completions, scores=None, ranks=None, **more):
    return {"id": "1", "prompt": "p", "completions": completions, "scores": scores, "ranks": ranks, **more}


def test_best_first_with_ties():
    assert normalise(record(["a", "b", "c", "d"], [0.5, 2, 0.5, True]), "row 1").record == {
        "id": "1",
        "prompt": "p",
        "completions": ["b", "d", "a", "c"],
        "scores": [2.0, 1.0, 0.5, 0.5],
        "ranks": [0, 1, 2, 2],
        "reference": None,
    }


def test_ranks_alone_become_dense():
    row = normalise(record(["a", "b", "c"], ranks=[7, 3, 7], reference="r"), "row 1").record
    assert (row["completions"], row["ranks"], row["scores"]) == (["b", "a", "c"], [0, 1, 1], None)
    assert row["reference"] == "r"


def test_duplicates_keep_the_best_rank():
    result = normalise(record(["a", "b", "a", "b", "c"], [1, 2, 3, 2, 0]), "row 1")
    assert result.record["completions"] == ["a", "b", "c"]
    assert result.record["scores"] == [3.0, 2.0, 0.0]
    assert (result.merged, result.omitted) == (2, 0)


def test_unranked_twins_are_merged_and_the_others_left_out():
    result = normalise(record(["a", "b", "a", "c"], ranks=[1, 0, None, None]), "row 1")
    assert (result.record["completions"], result.merged, result.omitted) == (["b", "a"], 1, 1)


def test_messages():
    row = record([[{"role": "assistant", "content": "a"}], "b"], [0, 1])
    row["prompt"] = [{"role": "user", "content": "hi", "name": None}]
    row = normalise(row, "row 1").record
    assert row["prompt"] == [{"role": "user", "content": "hi"}]
    assert row["completions"] == ["b", "a"]


def test_id_and_blank_reference():
    row = normalise(record(["a", "b"], [0, 1], id=None, reference=" \n"), "x.jsonl: line 12").record
    assert (row["id"], row["reference"]) == ("line-12", None)
    assert normalise(record(["a", "b"], [0, 1], id=7), "row 1").record["id"] == "7"


def test_normalising_twice_changes_nothing():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 6)
        values = [rng.choice([0, 0.5, 1, 2]) for _ in range(n)]
        texts = [rng.choice("abcdefgh") for _ in range(n)]
        given = record(texts, values) if rng.random() < 0.5 else record(texts, ranks=values)
        try:
            once = normalise(given, "row 1")
        except BadRow as error:
            assert error.reason in ("all tied", "one response")
            continue
        assert normalise(once.record, "elsewhere").record == once.record
        assert once.merged == n - len(set(texts))
        assert once.record["ranks"] == sorted(once.record["ranks"])
        assert set(once.record["ranks"]) == set(range(once.record["ranks"][-1] + 1))
        best = {t: max((v if given["scores"] else -v) for u, v in zip(texts, values, strict=True) if u == t)
                for t in set(texts)}  # fmt: skip
        order = [best[text] for text in once.record["completions"]]
        assert order == sorted(order, reverse=True)
        assert dense_ranks([-value for value in order]) == once.record["ranks"]


BAD = {
    "no responses": (record([], []), "x: line 2", "no responses"),
    "null responses": (record(None, []), "x: line 2", "no responses"),
    "responses are text": (record("ab", [0, 1]), "x: line 2", "text, not a list"),
    "responses are a number": (record(5, [0, 1]), "x: line 2", "a number, not a list"),
    "one response": (record(["a"], [1]), "x: line 2", "only one response"),
    "one after merging": (record(["a", "a"], [1, 2]), "x: line 2", "left of 2 (duplicates are merged)"),
    "all tied": (record(["a", "b"], [1, 1]), "x: line 2", "all 2 responses are tied"),
    "NaN": (record(["a", "b"], [1, NAN]), "x: line 2, candidate 1", "score is nan"),
    "infinite": (record(["a", "b"], [-INF, 1]), "x: line 2, candidate 0", "score is -inf"),
    "null score": (record(["a", "b"], [1, None]), "x: line 2, candidate 1", "missing (null)"),
    "text as score": (record(["a", "b"], [1, "2"]), "x: line 2, candidate 1", "score is the text '2', not a number"),
    "scores not a list": (record(["a", "b"], 1), "x: line 2", "scores are a number, not a list"),
    "fewer scores": (record(["a", "b"], [1]), "x: line 2", "2 responses, but 1 scores"),
    "more ranks": (record(["a", "b"], ranks=[0, 1, 2]), "x: line 2", "2 responses, but 3 ranks"),
    "no order": (record(["a", "b"]), "x: line 2", "neither scores nor ranks"),
    "disagreement": (record(["a", "b"], [1, 2], [0, 1]), "x: line 2", "different orders"),
    "nothing ranked": (record(["a", "b"], ranks=[None, None]), "x: line 2", "none of the responses is ranked"),
    "empty response": (record(["a", ""], [1, 2]), "x: line 2, candidate 1", "response is empty"),
    "blank response": (record([" \n", "a"], [1, 2]), "x: line 2, candidate 0", "response is empty"),
    "null response": (record(["a", None], [1, 2]), "x: line 2, candidate 1", "missing (null)"),
    "number as response": (record(["a", 4], [1, 2]), "x: line 2, candidate 1", "a number, not text"),
    "half a character": (record(["a", "b\ud83d"], [1, 2]), "x: line 2, candidate 1", "surrogate"),
    "no prompt": (record(["a", "b"], [1, 2], prompt=None), "x: line 2", "prompt is missing or empty"),
    "blank prompt": (record(["a", "b"], [1, 2], prompt=" "), "x: line 2", "prompt is missing or empty"),
    "no messages": (record(["a", "b"], [1, 2], prompt=[]), "x: line 2", "prompt is missing or empty"),
    "number as prompt": (record(["a", "b"], [1, 2], prompt=4), "x: line 2", "a number, not text or messages"),
    "no role": (record(["a", "b"], [1, 2], prompt=[{"content": "c"}]), "x: line 2, prompt", "without a `role`"),
    "no content": (record(["a", "b"], [1, 2], prompt=[{"role": "user"}]), "x: line 2, prompt", "found null"),
    "two messages": (
        record([[{"role": "user", "content": "q"}] * 2, "b"], [1, 2], prompt=[{"role": "user", "content": "q"}]),
        "x: line 2, candidate 0",
        "2 messages, one is expected",
    ),
    "number as reference": (record(["a", "b"], [1, 2], reference=4), "x: line 2, reference", "found a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_name_what_where_and_fix(case):
    row, where, what = BAD[case]
    with pytest.raises(BadRow) as caught:
        normalise(row, "x: line 2")
    assert caught.value.where == where
    assert what in caught.value.what
    assert caught.value.fix
    assert caught.value.reason


def test_add_reference():
    row = normalise(record(["a", "b"], [0.25, 0.5], reference="r"), "row 1").record
    best = normalise(add_reference(row, "best", "row 1"), "row 1").record
    assert (best["completions"], best["scores"], best["ranks"]) == (["r", "b", "a"], [1.5, 0.5, 0.25], [0, 1, 2])
    worst = normalise(add_reference(row, "worst", "row 1"), "row 1").record
    assert (worst["completions"], worst["scores"]) == (["b", "a", "r"], [0.5, 0.25, -0.75])
    unscored = normalise(record(["a", "b"], ranks=[0, 1], reference="b"), "row 1").record
    assert normalise(add_reference(unscored, "best", "row 1"), "row 1").record["completions"] == ["b", "a"]
    # A candidate that equals the reference keeps the better of its two ranks.
    assert normalise(add_reference(unscored, "worst", "row 1"), "row 1").record["completions"] == ["a", "b"]
    with pytest.raises(BadRow, match="no reference response"):
        add_reference(normalise(record(["a", "b"], [0, 1]), "row 1").record, "best", "row 1")


def test_report_as_dict():
    counts = {"read": 3, "kept": 2, "skipped": {"all tied": 1}, "duplicates_merged": 4, "omitted": 5}
    expected = {**counts, "contradictions": 6, "responses": 7, "comparisons": 8, "first_contradiction": "f: line 2"}
    report = ReadReport(**expected)
    assert report.as_dict() == expected
