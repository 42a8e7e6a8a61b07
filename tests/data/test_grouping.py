"""Rows of a prompt as one list: ratings, votes, ties, contradictions; labels, strengths and weighted scores."""

import itertools
import random

import pytest

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import Columns, DataSource, PromptConfig
from tuna_peft.data.grouping import rank_by_votes, winner_index
from tuna_peft.data.load import load_prompts, load_sft, read_ranked
from tuna_peft.errors import UserError

PLAIN = PromptConfig(template="{instruction}")


def load(path, **options):
    columns = options.pop("columns")
    return read_ranked(DataSource(path=path, columns=columns, **options), PLAIN)


def order(record):
    return list(zip(record["completions"], record["ranks"], strict=True))


def rated(prompt, response, score, **more):
    return {"q": prompt, "r": response, "s": score, **more}


ONE_A_ROW = {"instruction": "q", "completions": "r", "scores": "s"}


def test_one_response_a_row(jsonl):
    path = jsonl(
        rated("p1", "x", 1), rated("p2", "u", 5), rated("p1", "y", 2), rated("p2", "v", 5), rated("p2", "w", 7)
    )
    records, report = load(path, columns=ONE_A_ROW, group_by="q")
    assert [order(record) for record in records] == [[("y", 0), ("x", 1)], [("w", 0), ("u", 1), ("v", 1)]]
    assert [record["id"] for record in records] == ["line-1", "line-2"]
    assert (report.read, report.kept) == (2, 2)


def test_several_ratings_of_a_response_are_averaged(jsonl):
    path = jsonl(rated("p", "x", 1), rated("p", "y", 2), rated("p", "x", 5))
    [record], report = load(path, columns=ONE_A_ROW, group_by=["q"])
    assert record["scores"] == [3.0, 2.0]
    assert report.duplicates_merged == 1


def test_a_bad_row_of_a_group_is_named(jsonl):
    path = jsonl(rated("p", "x", 1), rated("p", "y", None), rated("o", "x", 1), rated("o", "y", 2))
    with pytest.raises(UserError, match="line 2: the score is missing"):
        load(path, columns=ONE_A_ROW, group_by="q")
    records, report = load(path, columns=ONE_A_ROW, group_by="q", on_bad_row="skip")
    assert (len(records), report.skipped) == (1, {"bad score": 1})
    with pytest.raises(UserError, match="the record has no key `question`"):
        load(path, columns=ONE_A_ROW, group_by="question")


@pytest.mark.parametrize("part", ["input", "system"])
def test_rows_with_another_prompt_are_another_group(jsonl, part):
    texts = (("x", 1, "A"), ("u", 1, "B"), ("y", 2, "A"), ("v", 2, "B"))
    rows = [rated("p", text, score, more=more) for text, score, more in texts]
    path = jsonl(*rows)
    source = DataSource(path=path, columns={**ONE_A_ROW, part: "more"}, group_by="q")
    records, _ = read_ranked(source, PromptConfig(template="chat"))
    assert [record["completions"] for record in records] == [["y", "x"], ["v", "u"]]


def test_a_group_that_is_wider_than_a_prompt(jsonl):
    texts = (("p", "x", 1), ("o", "u", 1), ("p", "y", 2), ("o", "v", 2))
    rows = [rated(prompt, text, score, topic="t") for prompt, text, score in texts]
    records, _ = load(jsonl(*rows), columns=ONE_A_ROW, group_by="topic")
    assert [record["completions"] for record in records] == [["y", "x"], ["v", "u"]]


def test_a_row_without_the_column_is_skipped_alone(jsonl):
    path = jsonl(rated("p", "x", 1), rated("p", "y", 2), {"r": "z", "s": 3})
    records, report = load(path, columns=ONE_A_ROW, group_by="q", on_bad_row="skip")
    assert [record["completions"] for record in records] == [["y", "x"]]
    assert report.skipped == {"missing field": 1}


def test_grouping_for_prompts_and_supervision(jsonl):
    source = DataSource(path=jsonl(rated("p", "x", 1), rated("p", "y", 2)), columns=ONE_A_ROW, group_by="q")
    [row], _ = load_prompts(source, PLAIN)
    assert row["record"] == rated("p", "x", 1)
    assert load_sft(source, PLAIN)[0]["completion"][:] == ["y"]


def test_pairs_become_a_ranking(jsonl):
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "e")]
    path = jsonl(*({"prompt": "p", "chosen": better, "rejected": worse} for better, worse in pairs))
    [record], report = read_ranked(DataSource(path=path, group_by="prompt"), PLAIN)
    assert order(record) == [("a", 0), ("b", 1), ("e", 1), ("c", 2), ("d", 3)]
    assert report.contradictions == 0


def vote(winner, a="x", b="y"):
    return {"q": "p", "a": a, "b": b, "w": winner}


LABELLED = {"instruction": "q", "completions": ["a", "b"], "winner": "w"}


def test_a_winner_column(jsonl):
    records, _ = load(jsonl(vote("model_b"), vote("A")), columns=LABELLED)
    assert [record["completions"] for record in records] == [["y", "x"], ["x", "y"]]
    with pytest.raises(UserError, match="all 2 responses are tied"):
        load(jsonl(vote("tie (bothbad)")), columns=LABELLED)
    with pytest.raises(UserError, match="the label '0' does not say which") as caught:
        load(jsonl(vote(0)), columns=LABELLED)
    assert "winner_labels" in caught.value.fix


def test_votes_of_several_rows(jsonl):
    """x beats y twice and loses once, y ties with z: two levels and one contradiction."""
    rows = [vote("A"), vote("A"), vote("B"), vote("tie", "y", "z")]
    [record], report = load(jsonl(*rows), columns=LABELLED, group_by="q")
    assert order(record) == [("x", 0), ("y", 1), ("z", 1)]
    assert report.contradictions == 1


def test_several_annotators(jsonl):
    row = {**vote("1"), "w2": 2, "w3": 2.0}
    [record], report = load(jsonl(row), columns={**LABELLED, "winner": ["w", "w2", "w3"]})
    assert record["completions"] == ["y", "x"]
    assert report.contradictions == 1


@pytest.mark.parametrize(("strength", "sign", "best"), [(-3, 1, "x"), (0.5, 1, "y"), (2, -1, "x")])
def test_a_strength_is_a_difference_of_scores(jsonl, strength, sign, best):
    columns = {"instruction": "q", "completions": ["a", "b"], "strength": {"w": sign}}
    [record], _ = load(jsonl(vote(strength)), columns=columns)
    assert record["completions"][0] == best
    assert record["scores"][0] - record["scores"][1] == abs(strength)


def test_strengths_of_several_pairs_are_votes_and_not_scores(jsonl):
    columns = {"instruction": "q", "completions": ["a", "b"], "strength": "w"}
    [record], _ = load(jsonl(vote(3, "x", "y"), vote(1, "y", "z")), columns=columns, group_by="q")
    assert (order(record), record["scores"]) == ([("z", 0), ("y", 1), ("x", 2)], None)


def test_scores_are_added_up_with_weights(jsonl):
    row = {"q": "p", "r": [{"t": "x", "good": 1, "long": 5}, {"t": "y", "good": "2", "long": 1}]}
    weights = {"r[].good": 0.5, "r[].long": -0.25}
    columns = {"instruction": "q", "completions": "r[].t", "scores": weights}
    [record], _ = load(jsonl(row), columns=columns)
    assert record["scores"] == [0.75, -0.75]
    row["r"][1]["long"] = None
    with pytest.raises(UserError, match=r"candidate 1, `r\[\].long`: the score is missing"):
        load(jsonl(row), columns=columns)


def test_only_one_order_is_given():
    with pytest.raises(ValueError, match="give `scores` or `winner`, not both"):
        Columns(instruction="q", completions="r", scores="s", winner="w")
    with pytest.raises(ValueError, match="give `winner` too"):
        Columns(instruction="q", completions="r", winner_labels={"0": "tie"})


@pytest.mark.parametrize(
    ("label", "labels", "index"),
    [
        ("model_a", None, 0), ("Response 2", None, 1), (1, None, 0), (2.0, None, 1), ("Tie", None, None),
        ("both bad", None, None), ("second", None, 1), ("y", None, 1), (0, {"0": 1, "1": 0}, 1),
        (0, {"0": "tie"}, None), ("gpt", {"gpt": 0}, 0),
        ("(B)", None, 1), ("b)", None, 1), ("A_much_better", None, 0), ("B is slightly better", None, 1),
        ("option 2", None, 1),
    ],
)  # fmt: skip
def test_labels(label, labels, index):
    assert winner_index(label, ["x", "y"], labels, "here") == index


@pytest.mark.parametrize("label", ["gpt", 0, 3, "model_c", ""])
def test_unknown_labels(label):
    with pytest.raises(BadRow, match="does not say which of 2 responses"):
        winner_index(label, ["x", "y"], None, "here")


def test_a_circle_is_a_tie_and_counted():
    ranks, wrong = rank_by_votes(4, [(0, 1, 1), (1, 2, 1), (2, 0, 1), (2, 3, 1)])
    assert (ranks, wrong) == ([0, 0, 0, 1], 3)


def test_what_nobody_compared_is_not_ranked():
    assert rank_by_votes(3, [(0, 2, -1)]) == ([1, None, 0], 0)


def test_votes_without_contradictions_are_all_respected():
    """Random votes that follow a hidden order with ties, against the definition."""
    draw = random.Random(0)
    for _ in range(100):
        hidden = [draw.randrange(4) for _ in range(6)]
        pairs = draw.sample(list(itertools.permutations(range(6), 2)), 8)
        votes = [(i, j, hidden[j] - hidden[i]) for i, j in pairs]
        ranks, wrong = rank_by_votes(6, votes)
        assert wrong == 0
        for i, j, sign in votes:
            assert (ranks[j] > ranks[i]) - (ranks[j] < ranks[i]) == (sign > 0) - (sign < 0)
