"""The task `lmentry`: reads the benchmark's own files and scores answers by its rules. `run.tasks` calls it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.files import Skipped, read_object, require_benchmark
from tuna_peft.evaluation.lmentry.patterns import normalise
from tuna_peft.evaluation.lmentry.rules import RULES
from tuna_peft.evaluation.lmentry.scores import VARIANTS, Scored, robustness
from tuna_peft.evaluation.results import Exclusion, Metric, PromptResult, TaskResult
from tuna_peft.evaluation.session import Question, Session

TASKS = (*RULES, *VARIANTS)
MAIN = "accuracy"


def rule_of(task: str) -> str:
    """The core task whose rule scores a task or variant."""
    return next(core for core in sorted(RULES, key=len, reverse=True) if task.startswith(core))


def read_lmentry(
    folder: Path, template: PromptTemplate, tasks: Sequence[str] | None = None, per_template: int | None = None
) -> tuple[list[Question], list[Exclusion]]:
    """Reads `<task>.json` for each of the 25 core tasks and the 16 robustness variants, or for those in `tasks`.

    Args:
        folder: The benchmark's `data` folder, or its checkout.
        template: Wraps each input.
        tasks: Names of tasks; None takes all.
        per_template: Use only the first N examples of each template; None takes all.

    Returns:
        The questions, and what was skipped: missing and broken files and examples. Files that hold fewer examples than
        the benchmark generated are listed too.

    Raises:
        UserError: An unknown task, or no usable example.
    """
    if unknown := sorted(set(tasks or ()) - set(TASKS)):
        raise UserError(f"LMentry has no task {', '.join(unknown)}", fix=f"Its tasks are {', '.join(TASKS)}.")
    require_benchmark(folder, "lmentry")
    folder = folder / "data" if (folder / "data").is_dir() else folder
    questions: list[Question] = []
    skipped = Skipped()
    for task in tasks or TASKS:
        file = folder / f"{task}.json"
        if not file.is_file():
            skipped.add("the file is missing", file.name)
            continue
        content = read_object(file, skipped)
        examples = content.get("examples") if content else None
        if content is None:
            continue
        if not isinstance(examples, dict) or not examples:
            skipped.add("the file has no examples", file.name)
            continue
        _note_partial(content, file, skipped)
        taken: dict[int, int] = defaultdict(int)
        for name, example in examples.items():
            question = _question(task, name, example, template)
            if question is None:
                skipped.add("the example has no input or no template_id", f"{task}/{name}")
                continue
            number = question.record["template_id"]
            taken[number] += 1
            if per_template is None or taken[number] <= per_template:
                questions.append(question)
    if not questions:
        raise UserError(f"no example can be used ({skipped})", where=str(folder))
    return questions, skipped.exclusions()


def evaluate_lmentry(
    session: Session,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    first_sentence: bool = False,
    excluded: Sequence[Exclusion] = (),
) -> TaskResult:
    """Greedy answers scored by the benchmark's rules.

    Args:
        max_new_tokens: Length at which an answer is truncated.
        first_sentence: Score only the first line, up to its first full stop, as the benchmark does with models that
            do not stop.

    Returns:
        `accuracy`, the mean over core tasks (the main metric); `robustness` and its four kinds; `lmentry_score`, their
        product, once all 41 files have been scored. Groups hold the accuracy of every task.
    """
    answers, too_long = session.answers(questions, max_new_tokens, "lmentry")
    by_task: dict[str, list[PromptResult]] = defaultdict(list)
    skipped = Skipped()
    for answer in answers:
        question, response = answer.question, normalise(answer.text, first_sentence=first_sentence)
        assert question.group is not None
        try:
            right = RULES[rule_of(question.group)](response, question.record)
        except (KeyError, TypeError, AttributeError, IndexError):
            skipped.add("the example lacks what its rule needs", question.id)
            continue
        template, place = question.record["template_id"], question.record.get("answer_index")
        by_task[question.group].append(answer.scored({MAIN: 100.0 * right}, template=template, place=place))
    _weigh(by_task)
    prompts = [prompt for of_task in by_task.values() for prompt in of_task]
    groups = {f"task: {task}": {MAIN: mean_metric(_scores(of_task))} for task, of_task in by_task.items()}
    left_out = [*excluded, *too_long, *skipped.exclusions()]
    return TaskResult("lmentry", MAIN, _metrics(by_task, prompts), prompts, groups, left_out)


def _weigh(by_task: dict[str, list[PromptResult]]) -> None:
    """Sets weights so that the weighted mean over examples is the mean over core tasks; variants get 0."""
    core = {task: prompts for task, prompts in by_task.items() if task in RULES}
    total = sum(map(len, core.values()))
    for task, prompts in by_task.items():
        for prompt in prompts:
            prompt.weight = total / len(core) / len(prompts) if task in core else 0.0


def _metrics(by_task: dict[str, list[PromptResult]], prompts: Sequence[PromptResult]) -> dict[str, Metric]:
    accuracy = mean_metric(_scores(prompts), [prompt.weight for prompt in prompts])
    kinds = robustness({task: Scored.of(of_task) for task, of_task in by_task.items()})
    values = [metric.value for metric in kinds.values()]
    complete = set(by_task) == set(TASKS) and accuracy.value is not None
    mean = sum(value or 0.0 for value in values) / len(values) if None not in values else None
    score = accuracy.value * mean / 100 if complete and accuracy.value is not None and mean is not None else None
    return {
        MAIN: accuracy,
        "lmentry_score": Metric(score, count=accuracy.count),
        "robustness": Metric(mean, count=len(values)),
        **kinds,
    }


def _scores(prompts: Sequence[PromptResult]) -> list[float | None]:
    return [prompt.scores[MAIN] for prompt in prompts]


def _question(task: str, name: str, example: Any, template: PromptTemplate) -> Question | None:
    """None for an example that is broken."""
    try:
        text, about = example["input"], {**example["metadata"], "input": example["input"]}
        about["template_id"] = int(about["template_id"])
        references = [str(about["answer"])] if "answer" in about else []
        return Question(f"{task}/{name}", text, template.render(text), references, task, about)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _note_partial(content: dict[str, Any], file: Path, skipped: Skipped) -> None:
    settings = content.get("settings")
    if not isinstance(settings, dict):
        return
    made = settings.get("num_examples_per_template", 0) * len(settings.get("input_templates") or ())
    there = len(content["examples"])
    if there < made:
        skipped.add("examples are missing: the file is partial", f"{file.name} ({there} of {made})", made - there)
