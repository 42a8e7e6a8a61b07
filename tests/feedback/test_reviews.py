"""Scores in free words; on FastChat's recorded reviews where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuna_peft.feedback.agreement import cohens_kappa
from tuna_peft.feedback.reviews import review_scores
from tuna_peft.feedback.verdict import Unreadable

VICUNA = Path(__file__).parents[3] / "shared" / "data" / "vicuna80"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\n\nAssistant 1 is good.", (8, 9)),
        ("8, 9.5\nx", (8, 9.5)),
        ("As follows:\n\nAssistant 1: 7/10\nAssistant 2: 9/10\n\nx", (7, 9)),
        ("Assistant 1:\nScore: 6/10\n- fine\n\nAssistant 2:\nScore: 8/10", (6, 8)),
        ("I would give Assistant 1 a score of 4 out of 10 and Assistant 2 a score of 8.", (4, 8)),
        ("I would rate Assistant 1's code submission a 7 out of 10 and Assistant 2's code submission a 9.", (7, 9)),
        ("We assign a score of 5 to Assistant 1 and a score of 9 to Assistant 2.", (5, 9)),
        ("Assistant 1's score is 3 out of 10, and Assistant 2's score is 10 out of 10.", (3, 10)),
        ("Therefore, the scores for Assistant 1 and Assistant 2 are 4 and 9, respectively.", (4, 9)),
        ("I would rate both Assistant 1 and Assistant 2's submissions a 9 out of 10.", (9, 9)),
        ("The points are (2, -2) and (10, 4).\n\nThe output tuple is (1, 6).", (1, 6)),
        ("B is longer, A is right. [[A]]", (1, 0)),
        ("Final verdict: [[C]]", (0, 0)),
    ],
)
def test_forms(text, scores):
    assert review_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Both are good.",
        "Given the points (2, 2) and (10, 4).",
        "Assistant 1: 7",
        "70 90",
        "Assistant 1 8 9",
        "[[A]] [[B]]",
    ],
)
def test_what_has_no_scores(text):
    with pytest.raises(Unreadable):
        review_scores(text)


@pytest.mark.skipif(not VICUNA.exists(), reason="needs ../shared/data")
def test_recorded_reviews():
    """All 1,440 reviews: two in which the reviewer gives none, three whose record is not what they say."""
    unread, other = [], []
    files = sorted((VICUNA / "review").rglob("*.jsonl"))
    rows = [(file, json.loads(line)) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert (len(files), len(rows)) == (18, 1440)
    for file, row in rows:
        try:
            found = review_scores(row["text"])
        except Unreadable:
            unread.append((file.stem, row["question_id"], row["score"]))
        else:
            if list(found) != row["score"]:
                other.append((file.stem, row["question_id"], row["score"], found))
    assert [score for _, _, score in unread] == [[-1, -1]] * 2  # "I cannot provide a score"
    assert other == [
        ("gpt-3.5-turbo_review_vicuna-13b-20230322-new-hp-fp16_vicuna-13b-20230322-new-hp-fp16", 65, [8, 8], (9, 9)),
        ("review_bard_vicuna-13b", 70, [10, 2], (10, 4)),
        ("review_llama-13b_vicuna-13b", 70, [10, 2], (10, 4)),
    ]


@pytest.mark.skipif(not VICUNA.exists(), reason="needs ../shared/data")
def test_gpt4_and_people():
    """The figure in docs/judging.md: GPT-4's reviews in one order against FairEval's people."""
    labels = {"CHATGPT": 1, "VICUNA13B": -1, "TIE": 0}
    people = [
        labels[line]
        for line in (VICUNA / "faireval/review/review_gpt35_vicuna-13b_human.txt").read_text().split("\n")
        if line
    ]
    file = VICUNA / "review/vicuna-13b_20230322-clean-lang/review_gpt35_vicuna-13b.jsonl"
    reviews = sorted(
        map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["question_id"]
    )
    pairs = []
    for human, row in zip(people, reviews, strict=True):
        one, two = review_scores(row["text"])
        pairs.append((human, (one > two) - (one < two)))
    assert sum(a == b for a, b in pairs) == 42
    assert cohens_kappa(pairs) == pytest.approx(0.228, abs=1e-3)
