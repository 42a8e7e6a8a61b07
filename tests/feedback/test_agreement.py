"""How far judges agree with people, on judges of known faults."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import pytest
from honest_judge import first_shown_wins, honest
from scripted_server import chat, scripted_server

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.errors import UserError
from tuna_peft.feedback.agreement import cohens_kappa, measure_agreement, read_annotated_rows, validation
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.journal import Journal

DATA = Path(__file__).parents[3] / "shared" / "data"
PANDALM = DATA / "pairs" / "pandalm_testset.jsonl"
VICUNA = DATA / "vicuna80"


def write_pairs(path, count, people):
    """Pairs of PandaLM's shape; people vote by `people(grade1, grade2)`."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            one, two = draw.sample(range(10), 2)
            votes = people(one, two)
            row = {"idx": i, "instruction": f"Task {i}", "input": "", "response1": f"grade {one}"}
            row |= {"response2": f"grade {two}", **{f"annotator{k + 1}": vote for k, vote in enumerate(votes)}}
            file.write(json.dumps(row) + "\n")
    return read_annotated_rows(DataSource(path=str(path)), PromptConfig())


def measure(people, settings, path):
    with Journal(path) as journal:
        return measure_agreement(people, validation(people, settings, journal), "pairs")


def server(url):
    return JudgeSettings.model_validate({"server": {"base_url": url, "model": "judge"}})


def test_a_judge_that_agrees(tmp_path):
    people = write_pairs(tmp_path / "p.jsonl", 40, lambda a, b: [1 if a > b else 2] * 3)
    with scripted_server(honest) as http:
        agreement, report = measure(people, server(http.url), tmp_path / "j.jsonl")
    assert (agreement.pairs, agreement.accuracy, agreement.kappa, agreement.decided_accuracy) == (40, 1.0, 1.0, 1.0)
    assert (agreement.position_bias, agreement.first_shown, agreement.judge_ties) == (0.0, None, 0.0)
    assert (agreement.annotators_accuracy, agreement.annotators_kappa) == (1.0, 1.0)
    assert report.asked == 80


def test_a_judge_that_takes_the_first(tmp_path):
    people = write_pairs(tmp_path / "p.jsonl", 40, lambda a, b: [1 if a > b else 2] * 3)
    with scripted_server(first_shown_wins) as http:
        agreement, _ = measure(people, server(http.url), tmp_path / "j.jsonl")
    assert (agreement.position_bias, agreement.first_shown, agreement.judge_ties) == (1.0, 1.0, 1.0)
    assert (agreement.accuracy, agreement.kappa, agreement.decided_accuracy) == (0.0, 0.0, None)


def test_a_judge_that_takes_the_last(tmp_path):
    people = write_pairs(tmp_path / "p.jsonl", 10, lambda a, b: [1] * 3)
    with scripted_server(lambda asked: chat('{"rank": [1, 0]}')) as http:
        agreement, _ = measure(people, server(http.url), tmp_path / "j.jsonl")
    assert (agreement.position_bias, agreement.first_shown) == (1.0, 0.0)


def test_votes_without_a_majority_and_answers_without_a_verdict(tmp_path):
    people = write_pairs(tmp_path / "p.jsonl", 10, lambda a, b: [1, 2, 0] if a > b else [2, 2, 0])
    split = sum(person.signs is None for person in people)
    assert 0 < split < 10

    def script(asked):
        return chat("no") if "Task 0\n" in asked.text else honest(asked)

    with scripted_server(script) as http:
        agreement, _ = measure(people, server(http.url), tmp_path / "j.jsonl")
    assert (agreement.without_majority, agreement.unjudged) == (split, 1)
    assert agreement.pairs == 10 - split - (people[0].signs is not None)
    with scripted_server(lambda asked: chat("no")) as http, pytest.raises(UserError, match="none of 10 records"):
        measure(people, server(http.url), tmp_path / "k.jsonl")


@pytest.mark.parametrize(
    ("votes", "signs"), [([1, 2], None), ([1, 1], [1]), ([2, 2, 1, 1], None), ([0, 0, 0, 1], [0]), ([2], [-1])]
)
def test_half_of_the_votes_is_no_majority(tmp_path, votes, signs):
    [person] = write_pairs(tmp_path / "p.jsonl", 1, lambda a, b: votes)
    assert person.signs == signs


def test_kappa_by_hand():
    # Cohen 1960: observed 0.7, chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    pairs = [(1, 1)] * 40 + [(1, -1)] * 10 + [(-1, 1)] * 20 + [(-1, -1)] * 30
    assert cohens_kappa(pairs) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohens_kappa([(1, 1), (1, 1)]) == 1.0


def test_ranked_data_of_any_format(tmp_path):
    rows = [
        {"prompt": f"Prompt {i}", "completions": ["grade 1", "grade 5", "grade 3"], "scores": [1, 5, 3]}
        for i in range(30)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    people = read_annotated_rows(DataSource(path=str(tmp_path / "r.jsonl")), PromptConfig())
    assert {sign for person in people for sign in person.signs} == {1, -1}  # not best first
    with scripted_server(honest) as http:
        agreement, _ = measure(people, server(http.url), tmp_path / "j.jsonl")
    assert (agreement.pairs, agreement.accuracy, agreement.kappa) == (90, 1.0, 1.0)


def test_annotations_that_are_none(tmp_path):
    with pytest.raises(UserError, match="line 1: the annotations .* are not 1, 2 or 0"):
        write_pairs(tmp_path / "p.jsonl", 1, lambda a, b: [3])
    with pytest.raises(UserError, match="the annotations"):
        write_pairs(tmp_path / "p.jsonl", 1, lambda a, b: [])


@pytest.mark.skipif(not PANDALM.exists(), reason="needs ../shared/data")
def test_pandalm_with_length_as_judge(tmp_path, monkeypatch):
    module = types.ModuleType("length_judge")
    module.longer = lambda record, response: len(response)
    monkeypatch.setitem(sys.modules, "length_judge", module)
    people = read_annotated_rows(DataSource(path=str(PANDALM)), PromptConfig())
    agreement, report = measure(people, JudgeSettings(function="length_judge:longer"), tmp_path / "j.jsonl")
    assert (agreement.pairs, agreement.without_majority, agreement.unjudged) == (999, 0, 0)
    # By a count of its own over the file.
    rows = [json.loads(line) for line in PANDALM.read_text(encoding="utf-8").splitlines()]
    right = 0
    for row in rows:
        votes = sorted(row[f"annotator{k}"] for k in (1, 2, 3))
        one, two = len(str(row["response1"])), len(str(row["response2"]))
        right += votes[1] == (1 if one > two else 2 if two > one else 0)  # the median of three is their majority
    assert agreement.accuracy == pytest.approx(right / 999)
    assert agreement.position_bias is None


@pytest.mark.skipif(not VICUNA.exists(), reason="needs ../shared/data")
def test_gpt4_and_people():
    """The figure in docs/judging.md: GPT-4's recorded scores in one order against FairEval's people."""
    labels = {"CHATGPT": 1, "VICUNA13B": -1, "TIE": 0}
    lines = (VICUNA / "faireval/review/review_gpt35_vicuna-13b_human.txt").read_text().split("\n")
    people = [labels[line] for line in lines if line]
    file = VICUNA / "review/vicuna-13b_20230322-clean-lang/review_gpt35_vicuna-13b.jsonl"
    reviews = sorted(
        map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["question_id"]
    )
    pairs = []
    for human, review in zip(people, reviews, strict=True):
        one, two = review["score"]
        pairs.append((human, (one > two) - (one < two)))
    assert sum(a == b for a, b in pairs) == 42
    assert cohens_kappa(pairs) == pytest.approx(0.228, abs=1e-3)
