"""The tasks of an evaluation with their data, read before anything is trained, so that a bad file costs seconds.

`read_tasks` turns the settings (`tuna_peft.recipe.evaluation_schema`) into `Task`s, each a function that measures one
stage; `tuna_peft.run.evaluate` runs them. The metrics are in `tuna_peft.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.load import encode_source, load_prompts
from tuna_peft.data.losses import report_losses
from tuna_peft.data.ranked import Record, response_text
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.evaluation.answers import evaluate_answers
from tuna_peft.evaluation.graded import evaluate_graded
from tuna_peft.evaluation.harness import evaluate_harness, require_harness
from tuna_peft.evaluation.lmentry.task import evaluate_lmentry, read_lmentry
from tuna_peft.evaluation.ranking import evaluate_ranking
from tuna_peft.evaluation.results import FOLDER, Exclusion, TaskResult, load_result
from tuna_peft.evaluation.session import Question, Session
from tuna_peft.evaluation.superni import evaluate_superni, read_superni, superni_questions
from tuna_peft.evaluation.vicuna import evaluate_vicuna, read_vicuna_answers, read_vicuna_questions
from tuna_peft.feedback.judge import judge_pairs
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.graders import load_grader
from tuna_peft.journal import content_key
from tuna_peft.recipe.evaluation_schema import (
    GradedTask,
    LMentryTask,
    LMEvalTask,
    RankingTask,
    SuperNITask,
    TaskSettings,
    VicunaTask,
)


@dataclass(frozen=True)
class Task:
    """One task of an evaluation, with its data in memory.

    Attributes:
        name: The name of its result.
        run: Measures the stage of a session.
        settings: What the result depends on besides the model. A saved result with other settings is not used.
    """

    name: str
    run: Callable[[Session], TaskResult]
    settings: dict[str, Any]


@dataclass
class TaskData:
    """The tasks of an evaluation and what was read for them.

    Attributes:
        tasks: The tasks in the order in which they are run.
        ranked: The encoded examples of the task `ranking`; None without it.
        counts: How many records of the user's own data were kept, skipped and truncated, by task.
    """

    tasks: list[Task] = field(default_factory=list)
    ranked: Dataset | None = None
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_tasks(
    settings: TaskSettings,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    stages: Sequence[str] = (),
) -> TaskData:
    """Reads the data of every task in `settings`.

    Args:
        prompt: The prompt template.
        tokenizer: The model's tokenizer.
        config: The model's configuration.
        stages: Names of all stages that can be evaluated, `base` among them.

    Raises:
        UserError: Data cannot be used, or a Python function does not exist.
    """
    data = TaskData()
    if settings.ranking:
        data.tasks.append(_ranking(settings.ranking, prompt, tokenizer, config, data))
    if settings.graded:
        data.tasks.append(_graded(settings.graded, prompt, data))
    if settings.superni:
        data.tasks += _superni(settings.superni, prompt)
    if settings.lmentry:
        data.tasks.append(_lmentry(settings.lmentry, prompt))
    if settings.vicuna:
        data.tasks.append(_vicuna(settings.vicuna, prompt, stages))
    if settings.lm_eval:
        data.tasks.append(_lm_eval(settings.lm_eval))
    return data


def _ranking(
    settings: RankingTask,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    data: TaskData,
) -> Task:
    rows, data.counts["ranking"] = encode_source(
        settings, prompt, tokenizer, config, max_length=settings.max_length, overflow=settings.overflow
    )
    report_losses(settings, data.counts["ranking"])
    data.ranked = rows
    return ranking_task(rows, settings.margin)


def ranking_task(rows: Dataset, margin: float, name: str = "ranking") -> Task:
    """The task `ranking` on encoded rows, or another one of its kind; `margin` as in `evaluate_ranking`."""

    def run(session: Session) -> TaskResult:
        result = evaluate_ranking(
            session.model, session.tokenizer, rows, batch_size=session.size(name, lengths), margin=margin,
            description=f"ranking ({session.stage})",
        )  # fmt: skip
        return replace(result, task=name)

    lengths = [(len(row["prompt_ids"]), [*map(len, row["completions_ids"])]) for row in rows]
    digest = content_key(rows=[[row["prompt_ids"], row["completions_ids"], row["ranks"]] for row in rows])
    return Task(name, run, {"margin": margin, "data": digest})


def answers_task(records: Sequence[Record], prompt: PromptConfig, max_new_tokens: int) -> Task:
    """The task `answers`: greedy answers to prompts; the reference is the best response, or the one in the data."""
    template = PromptTemplate(prompt)
    questions = [
        Question(
            one["id"], _text(one["prompt"], template), one["prompt"], _best_known(one),
            tools=one.get("tools"),
        )
        for one in records
    ]  # fmt: skip
    run = partial(evaluate_answers, questions=questions, max_new_tokens=max_new_tokens)
    return Task("answers", run, {"max_new_tokens": max_new_tokens, "data": _digest(questions)})


def _best_known(record: Record) -> list[str]:
    """The best response, or that of a prompt whose responses are not ranked; empty without one."""
    if record.get("ranks"):
        return [response_text(record["completions"][0])]
    return [record["reference"]] if record.get("reference") else []


def _graded(settings: GradedTask, prompt: PromptConfig, data: TaskData) -> Task:
    grader = load_grader(settings.grader, "evaluation.tasks.graded.grader")
    prompts, read = load_prompts(settings, prompt)
    report_losses(settings, read.as_dict())
    data.counts["graded"] = read.as_dict()
    template = PromptTemplate(prompt)
    questions = [
        Question(
            entry["id"], _text(entry["prompt"], template), entry["prompt"], record=entry["record"],
            tools=entry.get("tools"),
        )
        for entry in prompts
    ]  # fmt: skip
    run = partial(evaluate_graded, questions=questions, grade=grader, max_new_tokens=settings.max_new_tokens)
    return Task("graded", run, _settings(settings, questions, "grader", "max_new_tokens"))


def _superni(settings: SuperNITask, prompt: PromptConfig) -> list[Task]:
    instances, unusable = read_superni(Path(settings.path).expanduser(), settings.tasks, settings.per_task)
    tasks = []
    for shots in settings.shots:
        questions, without_examples = superni_questions(instances, shots, _template(settings.wrap, prompt))
        if not questions:
            raise UserError(
                f"no task has {shots} positive examples",
                where=settings.path,
                fix="Lower evaluation.tasks.superni.shots.",
            )
        run = partial(
            evaluate_superni, questions=questions, shots=shots, max_new_tokens=settings.max_new_tokens,
            excluded=[*unusable, *without_examples],
        )  # fmt: skip
        tasks.append(Task(f"superni-{shots}shot", run, _settings(settings, questions, "max_new_tokens")))
    return tasks


def _lmentry(settings: LMentryTask, prompt: PromptConfig) -> Task:
    template = _template(settings.wrap, prompt)
    folder = Path(settings.path).expanduser()
    questions, unusable = read_lmentry(folder, template, settings.tasks, settings.per_template)
    run = partial(
        evaluate_lmentry, questions=questions, max_new_tokens=settings.max_new_tokens,
        first_sentence=settings.first_sentence, excluded=unusable,
    )  # fmt: skip
    return Task("lmentry", run, _settings(settings, questions, "max_new_tokens", "first_sentence"))


def _vicuna(settings: VicunaTask, prompt: PromptConfig, stages: Sequence[str]) -> Task:
    questions, unusable = read_vicuna_questions(Path(settings.path).expanduser(), _template(settings.wrap, prompt))
    file = Path(settings.against).expanduser()
    answers_in_file: dict[str, str] | None = None
    if file.is_file():
        answers_in_file, broken = read_vicuna_answers(file)
        unusable = [*unusable, *broken]
    elif settings.against not in stages:
        raise UserError(
            f"there is no file {settings.against!r}, and no stage of that name",
            where="evaluation.tasks.vicuna.against",
            fix=f"Give a file of answers in FastChat's format, or a stage: {', '.join(stages)}.",
        )
    judge = settings.judge.model_copy(update={"on_no_answer": "skip"})  # the result names questions without a verdict
    if judge.function is None:  # a Python function grades each response alone, so it has no order to swap
        judge.both_orders = True

    def run(session: Session) -> TaskResult:
        def compare(rows: list[dict[str, Any]]) -> list[int | None]:
            journal = session.folder / FOLDER / "judge.jsonl"
            device = str(next(session.model.parameters()).device)  # that of the model under evaluation
            return judge_pairs(rows, judge, journal, device=device, description=f"judging ({session.stage})")[0]

        against, excluded = answers_in_file, unusable
        if against is None and session.stage != settings.against:
            result = load_result(session.folder, settings.against, "vicuna")
            against = {prompt.id: prompt.response for prompt in result.prompts} if result else None
            if against is None:  # during a run, the stage to compare with is still to be trained
                reason = f"the stage {settings.against} had not answered yet"
                excluded = [*unusable, Exclusion.of(reason, (question.id for question in questions))]
        return evaluate_vicuna(
            session, questions, against=against, judge=compare, max_new_tokens=settings.max_new_tokens,
            excluded=excluded,
        )  # fmt: skip

    kept = _settings(settings, questions, "max_new_tokens")
    other = settings.against if answers_in_file is None else content_key(answers=answers_in_file)
    return Task("vicuna", run, {**kept, "against": other, "judge": _judge_name(judge)})


def _judge_name(judge: JudgeSettings) -> str | None:
    return judge.server.model if judge.server is not None else judge.model or judge.function


def _lm_eval(settings: LMEvalTask) -> Task:
    folder = settings.include_path
    if folder is not None and not Path(folder).is_dir():
        raise UserError(
            "there is no such folder", where=folder, fix="Correct evaluation.tasks.lm_eval.include_path, or remove it."
        )
    require_harness()
    kept = settings.model_dump()
    return Task("lm_eval", partial(evaluate_harness, **kept), kept)


def _template(wrap: bool, prompt: PromptConfig) -> PromptTemplate:
    return PromptTemplate(prompt if wrap else PromptConfig(template="none"))


def _settings(settings: Any, questions: list[Question], *names: str) -> dict[str, Any]:
    """The settings that a result depends on: those called `names`, and a hash of the questions."""
    return {**{name: getattr(settings, name) for name in names}, "data": _digest(questions)}


def _digest(questions: list[Question]) -> str:
    told = [[one.id, one.prompt, one.references, *filter(None, [one.tools])] for one in questions]
    return content_key(questions=told)


def _text(prompt: Any, template: PromptTemplate) -> str:
    """A prompt without the template around it, for reports."""
    if isinstance(prompt, str):
        return template.unwrap(prompt)
    return "\n\n".join(message["content"] for message in prompt)
