"""Own samples, ranked by the grader or by a teacher, and how often teachers agree with the grader.

Every step keeps a journal in the work folder: the same command resumes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.superni.sets import CHAT, Record
from benchmarks.superni.sizes import SAMPLING_SEED, Sizes
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_prompts
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.reference_grade import grade
from tuna_peft.evaluation.results import Metric
from tuna_peft.feedback.judge import judge_rows
from tuna_peft.feedback.local_model import load_local_model
from tuna_peft.feedback.sampling import ModelSampler, sample_candidates
from tuna_peft.feedback.settings import JudgeSettings, SampleSettings, ScoreSettings
from tuna_peft.feedback.teacher import score_rows
from tuna_peft.files import write_jsonl
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import Base
from tuna_peft.models.stack.files import AdapterStack

GRADER = "builtin:references"
TEMPERATURE = 1.0
LEAST_AGREEMENT = 0.60
"""A teacher whose order agrees with the grader's on a smaller share of pairs is none."""

_ALPACA = PromptTemplate(PromptConfig(template="alpaca"))
ITSELF, WITH_REFERENCE = "itself", "itself, with the reference in its context"


@dataclass(frozen=True)
class Agreement:
    """How often a teacher orders two responses as the grader does.

    Attributes:
        share: Over pairs that differ in grade, with an interval by a bootstrap over prompts.
        prompts: Number of prompts with such a pair.
    """

    share: Metric
    prompts: int


def samples(
    model: Base | AdapterStack, work: Path, name: str, sizes: Sizes, limit: int | None = None, journal: str = ""
) -> list[Record]:
    """Samples of a model for each prompt of the set `name`, or for its first `limit`.

    Args:
        journal: Name of the journal; by default that of the set, for the base's samples.
    """
    prompts, _ = load_prompts(DataSource(path=str(work / f"{name}.jsonl"), format="alpaca", limit=limit), CHAT)
    settings = SampleSettings(
        n=sizes.samples, temperature=TEMPERATURE, max_new_tokens=sizes.sample_tokens, trials=1, batch_size=32
    )
    with Journal(work / "journals" / f"{journal or name}.samples.jsonl") as answers:
        sampler = ModelSampler(model.model, model.tokenizer)
        return sample_candidates(sampler, prompts, settings, answers, seed=SAMPLING_SEED)[0]


def write_graded(rows: Sequence[Record], work: Path, name: str) -> dict[str, Any]:
    """Ranks the samples by the grader, and writes what the arms train on.

    `NAME-lists.jsonl` has the lists, `NAME-pairs.jsonl` their best and worst responses, `NAME-gold.jsonl` the
    reference of each prompt that has a list.

    Returns:
        Numbers of prompts and lists, and the mean and best grades of the samples in percent.
    """
    ranked, report = judge_rows(rows, JudgeSettings(function=GRADER), work / "journals" / f"{name}.grades.jsonl")
    write_jsonl(work / f"{name}-lists.jsonl", ranked)
    write_jsonl(work / f"{name}-pairs.jsonl", (_ends(record) for record in ranked))
    kept = {record["id"] for record in ranked}
    write_jsonl(work / f"{name}-gold.jsonl", (row["record"] for row in rows if row["id"] in kept))
    graded = [[grade(row["record"], text) for text in row["completions"]] for row in rows]
    return {
        "prompts": report.rows,
        "lists": report.ranked,
        "mean_grade": 100 * sum(sum(one) / len(one) for one in graded) / len(graded),
        "best_grade": 100 * sum(map(max, graded)) / len(graded),
    }


def _ends(record: Record) -> Record:
    best_and_worst = {key: [record[key][0], record[key][-1]] for key in ("completions", "scores")}
    return {"id": record["id"], "prompt": record["prompt"], **best_and_worst}


def teacher_scores(teacher: str, rows: Sequence[Record], base: Base, journal: Path) -> dict[str, dict[str, float]]:
    """The teacher's length-normalized log-probability of each response, by prompt and text.

    Args:
        teacher: `ITSELF`, `WITH_REFERENCE`, or a model on this machine; without a chat template it is shown Alpaca's.
        rows: Samples, as `samples` returns them.
    """
    shown = [_with_reference(row) for row in rows] if teacher == WITH_REFERENCE else list(rows)
    settings = ScoreSettings(model="the base" if teacher in (ITSELF, WITH_REFERENCE) else teacher)
    model = base if teacher in (ITSELF, WITH_REFERENCE) else load_local_model(settings, "auto")
    if not model.tokenizer.chat_template:
        shown = [{**row, "prompt": _ALPACA.render(row["prompt"][0]["content"])} for row in shown]
    with Journal(journal) as journal_:
        scored, _ = score_rows(model.model, model.tokenizer, shown, settings, journal_)
    return {row["id"]: dict(zip(row["completions"], row["scores"], strict=True)) for row in scored}


def _with_reference(row: Record) -> Record:
    [message] = row["prompt"]
    hint = f"{message['content']}\n\nThe correct answer is: {row['record']['output']}\nGive this answer."
    return {**row, "prompt": [{**message, "content": hint}]}


def agreement(scores: dict[str, dict[str, float]], rows: Sequence[Record]) -> Agreement:
    """Compares a teacher's scores with the grader's, see `Agreement`."""
    shares, weights = [], []
    for row in rows:
        by_teacher = scores.get(row["id"], {})
        graded = [(grade(row["record"], text), by_teacher[text]) for text in row["completions"] if text in by_teacher]
        pairs = [(a, b) for a, b in itertools.combinations(graded, 2) if a[0] != b[0]]
        if pairs:
            shares.append(sum((a[0] > b[0]) == (a[1] > b[1]) for a, b in pairs) / len(pairs))
            weights.append(len(pairs))
    return Agreement(mean_metric(shares, weights), len(shares))


def write_scored(scores: dict[str, dict[str, float]], rows: Sequence[Record], work: Path, name: str) -> int:
    """Writes `NAME-lists.jsonl` with the samples in the teacher's order, and returns their number."""
    ranked = [
        {"id": row["id"], "prompt": row["prompt"], "completions": list(found), "scores": list(found.values())}
        for row in rows
        if len(set((found := scores.get(row["id"], {})).values())) > 1
    ]
    write_jsonl(work / f"{name}-lists.jsonl", ranked)
    return len(ranked)
