"""The judge's own response, in every combination with orders, ties and repeated responses."""

from __future__ import annotations

import json

import pytest
from honest_judge import grade, honest, rows, shown, verdict
from scripted_server import chat, scripted_server

from tuna_peft.feedback.judge import judge_rows


def test_own_response_as_the_best_candidate(settings, tmp_path):
    with scripted_server(honest) as http:
        records, report = judge_rows(rows(3), settings(http.url, include_judge_answer=True), tmp_path / "j.jsonl")
    assert all(record["completions"][0] == "the best" and len(record["completions"]) == 5 for record in records)
    assert [record["ranks"] for record in records] == [[0, 1, 2, 3, 4]] * 3
    assert (report.own_best, report.own_not_best) == (3, 0)


def test_own_response_as_reference(settings, tmp_path):
    with scripted_server(honest) as http:
        wanted = settings(http.url, include_judge_answer="reference")
        records, _ = judge_rows([{**rows(1)[0], "reference": "old"}], wanted, tmp_path / "j.jsonl")
    assert records[0]["reference"] == "the best" and "the best" not in records[0]["completions"]


def test_own_response_that_the_judge_itself_ranks_lower_stays_out(settings, tmp_path):
    def modest(asked):
        n = len(shown(asked))
        return chat(json.dumps({"own_response": "so-so", "rank": [*range(n), n]}))

    with scripted_server(modest) as http:
        records, report = judge_rows(rows(2), settings(http.url, include_judge_answer=True), tmp_path / "j.jsonl")
    assert ["so-so" in record["completions"] for record in records] == [False, False]
    assert (report.own_best, report.own_not_best) == (0, 2)


def test_own_response_that_is_best_in_one_order_only_stays_out(settings, tmp_path):
    def unsure(asked):
        order = sorted(range(len(shown(asked))), key=lambda i: -grade(shown(asked)[i]))
        own = [len(order)]
        return chat(json.dumps({"own_response": "mine", "rank": own + order if asked.number else order + own}))

    with scripted_server(unsure) as http:
        wanted = settings(http.url, {"in_flight": 1}, include_judge_answer=True, both_orders=True)
        [record], report = judge_rows(rows(1), wanted, tmp_path / "j.jsonl")
    assert len(http.asked) == 2 and len(record["completions"]) == 4
    assert (report.own_best, report.own_not_best) == (0, 1)


@pytest.mark.parametrize("own", ["best", "equal to the best", "worst"])
@pytest.mark.parametrize("include", [False, True, "reference"])
@pytest.mark.parametrize("both_orders", [False, True])
def test_pairs_of_options_with_ties_and_repeated_responses(settings, tmp_path, both_orders, include, own):
    """The judge finds the responses of grade 5 equal; the row has one response twice."""

    def script(asked):
        texts = shown(asked)
        order = sorted(range(len(texts)), key=lambda i: (-grade(texts[i]), i))
        best, mine = order[:2], len(texts)
        assert {grade(texts[i]) for i in best} == {5}
        groups = [[*best, mine] if own.startswith("equal") else best]
        rank = [mine, *order] if own == "best" else [*order, mine] if own == "worst" else [*best, mine, *order[2:]]
        return chat(json.dumps({"own_response": "mine", "duplicates": groups, "rank": rank}))

    row = {"id": "0", "prompt": "p", "completions": ["grade 1", "grade 5", "grade 1", "5 grade 5"], "reference": "old"}
    with scripted_server(script) as http:
        wanted = settings(http.url, include_judge_answer=include, both_orders=both_orders)
        [record], report = judge_rows([row], wanted, tmp_path / "j.jsonl")
    added = include is True and own == "best"
    assert sorted(record["completions"][added:]) == ["5 grade 5", "grade 1", "grade 5"]
    assert record["completions"][-1] == "grade 1" and record["completions"][:added] == ["mine"][:added]
    assert record["ranks"] == ([0, 1, 1, 2] if added else [0, 0, 1])
    assert record["reference"] == ("mine" if include == "reference" and own == "best" else "old")
    assert (report.own_best, report.own_not_best) == ((own == "best", own != "best") if include else (0, 0))
    assert report.asked == len(http.asked) == 1 + both_orders
    assert (report.pairs, report.pairs_reversed) == (6 * both_orders, 0)


def test_own_response_that_repeats_a_response_joins_it(settings, tmp_path):
    def copies(asked):
        return chat(verdict(asked, own=max(shown(asked), key=grade)))

    with scripted_server(copies) as http:
        [record], _ = judge_rows(rows(1), settings(http.url, include_judge_answer=True), tmp_path / "j.jsonl")
    assert record["ranks"] == [0, 1, 2, 3]
