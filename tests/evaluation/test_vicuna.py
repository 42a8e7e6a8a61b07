"""Vicuna QA: reading, verdicts in shares, a judge that fails for some questions."""

import json
from collections import Counter
from pathlib import Path

import pytest
from scripted_session import RAW, Scripted

from tuna_peft.errors import UserError
from tuna_peft.evaluation.vicuna import evaluate_vicuna, read_vicuna_answers, read_vicuna_questions

DATA = Path(__file__).parents[3] / "shared" / "data" / "vicuna80"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/vicuna80")


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "question.jsonl"
    rows = [
        {"question_id": i, "text": f"Question {i}?", "category": "even" if i % 2 == 0 else "odd"} for i in range(6)
    ]
    file.write_text("\n".join([*map(json.dumps, rows), '{"question_id": 7}', "{"]))
    read, left_out = read_vicuna_questions(file, RAW)
    assert {one.reason: one.names for one in left_out} == {
        "the question has no id or no text": ["7"],
        "the line is no JSON": ["question.jsonl: line 8"],
    }
    return read


def test_shares_and_what_has_no_verdict(questions):
    against = {str(i): "theirs" for i in range(5)}  # none for the last question
    seen = []

    def judge(rows):
        seen.extend(rows)
        return [1, 1, 0, -1, None]

    result = evaluate_vicuna(
        Scripted(lambda question: "ours"), questions, against=against, judge=judge, max_new_tokens=9
    )
    assert [row["completions"] for row in seen] == [["ours", "theirs"]] * 5
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values == {"win_rate": 0.625, "win": 0.5, "tie": 0.25, "lose": 0.25}
    assert result.metrics["win_rate"].count == 4 and result.metrics["win_rate"].low < 0.625
    assert [prompt.scores["win_rate"] for prompt in result.prompts] == [1, 1, 0.5, 0, None, None]
    assert {one.reason: one.names for one in result.excluded} == {
        "the judge gave no verdict": ["4"],
        "the other side has no answer to the question": ["5"],
    }
    assert result.groups["category: even"]["win_rate"].value == 0.75
    assert result.prompts[0].details["against"] == "theirs"


def test_without_another_side_there_are_answers_and_no_numbers(questions):
    result = evaluate_vicuna(Scripted(lambda question: "ours"), questions, against=None, judge=None, max_new_tokens=9)
    assert len(result.prompts) == 6 and result.metrics["win_rate"].value is None and not result.excluded


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match="there is no question in it"):
        read_vicuna_questions(tmp_path / "empty.jsonl", RAW)
    with pytest.raises(UserError, match="there is no answer in it"):
        read_vicuna_answers(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot read the file"):
        read_vicuna_answers(tmp_path / "none.jsonl")


@needs_data
def test_all_published_reviews_give_the_published_wins():
    """Each of the 18 files of GPT-4's and GPT-3.5's 80 reviews, as the judge of our own comparison."""
    questions, left_out = read_vicuna_questions(DATA / "question.jsonl", RAW)
    assert len(questions) == 80 and not left_out
    answers, named = {}, {}
    for file in sorted((DATA / "answer").glob("*.jsonl")):
        answers[file.name], broken = read_vicuna_answers(file)
        assert len(answers[file.name]) == 80 and not broken
        named |= {row["answer_id"]: file.name for row in records(file)}
    files, without_verdict = sorted((DATA / "review").rglob("*.jsonl")), []
    for file in files:
        reviews = {str(review["question_id"]): review for review in records(file)}
        [(one, two)] = {(named[review["answer1_id"]], named[review["answer2_id"]]) for review in reviews.values()}
        # A reviewer that gave no scores stands in the files as -1 twice.
        scores = {name: None if review["score"] == [-1, -1] else review["score"] for name, review in reviews.items()}
        result = evaluate_vicuna(
            Scripted(lambda question, mine=answers[one]: mine[question.id]), questions, against=answers[two],
            judge=lambda rows, given=scores: [verdict(given[row["id"]]) for row in rows], max_new_tokens=9,
        )  # fmt: skip
        expected = Counter(verdict(pair) for pair in scores.values())
        unread = expected.pop(None, 0)
        counted = {name: round((80 - unread) * result.metrics[name].value) for name in ("win", "tie", "lose")}
        assert counted == {"win": expected[1], "tie": expected[0], "lose": expected[-1]}, file.name
        assert result.metrics["win_rate"].count == 80 - unread == sum(counted.values())
        without_verdict += [(file.stem, one.names) for one in result.excluded]
    assert len(files) == 18 and [names for _, names in without_verdict] == [["61"], ["61"]]


def verdict(scores):
    return None if scores is None else (scores[0] > scores[1]) - (scores[0] < scores[1])


def records(file):
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())
