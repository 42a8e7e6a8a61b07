"""Vicuna QA (https://lmsys.org/blog/2023-03-30-vicuna/): 80 questions; a judge compares two sets of answers.

The judge is passed as a function, so that evaluation does not depend on judges' servers. `run.tasks` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.files import Skipped, read_lines, require_benchmark
from tuna_peft.evaluation.results import Exclusion, Metric, PromptResult, TaskResult
from tuna_peft.evaluation.session import Question, Session

PairJudge = Callable[[list[dict[str, Any]]], list[int | None]]
"""Takes rows `{"id", "prompt", "completions": [two], "record"}`; returns for each 1 if the first completion is better,
-1 if the second is, 0 for a tie, None without a verdict."""

MAIN = "win_rate"
_SHARES = {"win": 1, "tie": 0, "lose": -1}


def read_vicuna_questions(path: Path, template: PromptTemplate) -> tuple[list[Question], list[Exclusion]]:
    """Reads FastChat's `question.jsonl`: `question_id`, `text` and `category` in each line.

    Raises:
        UserError: No question can be used.
    """
    require_benchmark(path, "vicuna")
    skipped, questions = Skipped(), []
    for record in read_lines(path, skipped):
        name, text = str(record.get("question_id")), record.get("text")
        if "question_id" not in record or not isinstance(text, str) or not text.strip():
            skipped.add("the question has no id or no text", name)
            continue
        if (prompt := skipped.rendered(template, text, name)) is None:
            continue
        questions.append(Question(name, text, prompt, group=record.get("category"), record=record))
    if not questions:
        raise UserError("there is no question in it", where=str(path), fix="Give FastChat's question.jsonl.")
    return questions, skipped.exclusions()


def read_vicuna_answers(path: Path) -> tuple[dict[str, str], list[Exclusion]]:
    """Reads a set of answers in FastChat's format: `question_id` and `text` in each line. Returns them by question.

    Raises:
        UserError: No answer can be used.
    """
    skipped = Skipped()
    answers: dict[str, str] = {}
    for record in read_lines(path, skipped):
        if "question_id" not in record or not isinstance(record.get("text"), str):
            skipped.add("the answer has no question_id or no text", str(record.get("question_id")))
            continue
        answers[str(record["question_id"])] = record["text"]
    if not answers:
        raise UserError("there is no answer in it", where=str(path), fix="Give a set of answers in FastChat's format.")
    return answers, skipped.exclusions()


def evaluate_vicuna(
    session: Session,
    questions: Sequence[Question],
    *,
    against: Mapping[str, str] | None,
    judge: PairJudge | None,
    max_new_tokens: int,
    excluded: Sequence[Exclusion] = (),
) -> TaskResult:
    """Answers the questions, and has the judge compare each answer with the other side's.

    Args:
        against: The other side's answers by question; without them nothing is judged.
        judge: Compares two answers, see `PairJudge`; without it nothing is judged.

    Returns:
        `win_rate` (the main metric: ties count half), `win`, `tie` and `lose`, as shares of the questions that have a
        verdict; `win_rate` also by category. Answers without a verdict are kept and listed as excluded.
    """
    answers, too_long = session.answers(questions, max_new_tokens, "vicuna")
    verdicts: dict[str, int | None] = {}
    skipped = Skipped()
    if against is not None and judge is not None:
        rows = [
            {"id": answer.question.id, "prompt": answer.question.text, "record": answer.question.record,
             "completions": [answer.text, against[answer.question.id]]}
            for answer in answers if against.get(answer.question.id)
        ]  # fmt: skip
        verdicts = {str(row["id"]): verdict for row, verdict in zip(rows, judge(rows), strict=True)}
        for answer in answers:
            if answer.question.id not in verdicts:
                skipped.add("the other side has no answer to the question", answer.question.id)
            elif verdicts[answer.question.id] is None:
                skipped.add("the judge gave no verdict", answer.question.id)
    prompts = []
    for answer in answers:
        verdict, other = verdicts.get(answer.question.id), (against or {}).get(answer.question.id)
        score = None if verdict is None else (1 + verdict) / 2
        prompts.append(answer.scored({MAIN: score}, verdict=verdict, **({} if other is None else {"against": other})))
    given = [prompt.details["verdict"] for prompt in prompts]
    metrics = {MAIN: _win_rate(prompts)} | {
        name: mean_metric([None if verdict is None else float(verdict == value) for verdict in given])
        for name, value in _SHARES.items()
    }
    categories = sorted({prompt.group for prompt in prompts if prompt.group is not None})
    groups = {
        f"category: {name}": {MAIN: _win_rate([prompt for prompt in prompts if prompt.group == name])}
        for name in categories
    }
    return TaskResult("vicuna", MAIN, metrics, prompts, groups, [*excluded, *too_long, *skipped.exclusions()])


def _win_rate(prompts: Sequence[PromptResult]) -> Metric:
    return mean_metric([prompt.scores[MAIN] for prompt in prompts])
