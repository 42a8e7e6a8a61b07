"""Super-NaturalInstructions (Wang et al., EMNLP 2022, https://arxiv.org/abs/2204.07705), scored as by Tk-Instruct.

Scores are ROUGE-L (F1, stemmed) and exact match after normalization, each the best over the references, in percent.
Prompts have Tk-Instruct's encoding: the definition, one positive example per shot, the input. `run.tasks` calls it.
"""

from __future__ import annotations

import functools
import string
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.files import Skipped, read_lines, read_object, require_benchmark
from tuna_peft.evaluation.results import Exclusion, Metric, PromptResult, TaskResult
from tuna_peft.evaluation.session import Question, Session

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

MAIN = "rouge_l"


def read_superni(
    path: Path, tasks: Sequence[str] | None = None, per_task: int | None = 100
) -> tuple[list[dict[str, Any]], list[Exclusion]]:
    """Reads instances, each with `task`, `category`, `id`, `definition`, `positive_examples`, `input`, `output`.

    Args:
        path: A checkout of allenai/natural-instructions (its test tasks, unless `tasks` are given), a folder of task
            files in that format, or a .jsonl file with one instance per line and the keys above.
        tasks: Names of tasks; None takes all in the folder.
        per_task: Use only the first N instances of each task (100 in the benchmark); None takes all.

    Returns:
        The instances, and what was skipped: missing tasks, broken files and instances.

    Raises:
        UserError: There is no usable instance.
    """
    require_benchmark(path, "natural-instructions")
    skipped = Skipped()
    if path.is_dir():
        by_task = _read_folder(path, tasks, skipped)
    else:
        by_task = defaultdict(list)
        for record in read_lines(path, skipped):
            by_task[str(record.get("task"))].append(record)
    instances = []
    for task in by_task if tasks is None else tasks:
        found = by_task.get(task, [])
        if not found:
            skipped.add("the task is missing", task)
        for record in found[:per_task]:
            if reason := _why_unusable(record):
                skipped.add(reason, str(record.get("id", task)))
            else:
                instances.append(record)
    if not instances:
        raise UserError(f"no instance can be used ({str(skipped) or 'it is empty'})", where=str(path))
    return instances, skipped.exclusions()


def superni_questions(
    instances: Sequence[dict[str, Any]], shots: int, template: PromptTemplate
) -> tuple[list[Question], list[Exclusion]]:
    """Prompts with `shots` positive examples, and the instances whose task has too few of them."""
    questions, skipped = [], Skipped()
    for instance in instances:
        examples = instance.get("positive_examples") or []
        if len(examples) < shots or any(not _is_example(example) for example in examples[:shots]):
            skipped.add(f"the task has fewer than {shots} positive examples", instance["id"])
            continue
        text = encode(instance, examples[:shots])
        if (prompt := skipped.rendered(template, text, instance["id"])) is None:
            continue
        record = {"category": instance["category"]}
        questions.append(Question(instance["id"], text, prompt, instance["output"], instance["task"], record))
    return questions, skipped.exclusions()


def encode(instance: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """The text of an instance in Tk-Instruct's encoding (definition, positive examples, input)."""
    definition = instance["definition"]
    parts = [f"Definition: {_ended(definition if isinstance(definition, str) else definition[0])}\n\n"]
    for number, example in enumerate(examples, 1):
        parts.append(f" Positive Example {number} -\n")
        parts.append(f"Input: {_ended(example['input'])}\n Output: {_ended(example['output'])}\n\n")
    parts.append(f"Now complete the following example -\nInput: {_ended(instance['input'])}\nOutput: ")
    return "".join(parts)


def evaluate_superni(
    session: Session,
    questions: Sequence[Question],
    *,
    shots: int,
    max_new_tokens: int,
    excluded: Sequence[Exclusion] = (),
) -> TaskResult:
    """Greedy answers and their scores: `rouge_l` (the main metric) and `exact_match`, also by task and by category."""
    task = f"superni-{shots}shot"
    answers, too_long = session.answers(questions, max_new_tokens, task)
    prompts = [
        answer.scored(
            {MAIN: rouge_l(answer.text, answer.question.references),
             "exact_match": exact_match(answer.text, answer.question.references)},
            category=answer.question.record["category"],
        )
        for answer in answers
    ]  # fmt: skip
    groups: dict[str, list[PromptResult]] = defaultdict(list)
    for prompt in prompts:
        groups[f"category: {prompt.details['category']}"].append(prompt)
        groups[f"task: {prompt.group}"].append(prompt)
    by_group = {name: _metrics(groups[name]) for name in sorted(groups)}
    return TaskResult(task, MAIN, _metrics(prompts), prompts, by_group, [*excluded, *too_long])


def rouge_l(response: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 with stemming, the best over the references, in percent."""
    return 100 * max(_scorer().score(reference, response)["rougeL"].fmeasure for reference in references)


def exact_match(response: str, references: Sequence[str]) -> float:
    """100 if the response equals a reference except for case, punctuation and spacing, else 0."""
    return 100.0 * any(normalise(response) == normalise(reference) for reference in references)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, with single spaces: as SQuAD does, but articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _metrics(prompts: Sequence[PromptResult]) -> dict[str, Metric]:
    return {name: mean_metric([prompt.scores[name] for prompt in prompts]) for name in (MAIN, "exact_match")}


@functools.cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # This is the default, passed because otherwise rouge_score logs about it and configures logging for the process.
    return RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))


def _read_folder(path: Path, tasks: Sequence[str] | None, skipped: Skipped) -> dict[str, list[dict[str, Any]]]:
    """Instances by task, from files in the benchmark's format."""
    folder = path / "tasks" if (path / "tasks").is_dir() else path
    split = path / "splits" / "default" / "test_tasks.txt"
    if tasks is None and split.is_file():
        tasks = split.read_text(encoding="utf-8").split()
    if tasks is None:
        tasks = sorted(file.stem for file in folder.glob("task*.json"))
    by_task: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        by_task[task] = []
        file = folder / f"{task}.json"
        content = read_object(file, skipped) if file.is_file() else None
        if content is None:
            continue
        shared = {
            "task": task,
            "category": (content.get("Categories") or [None])[0],
            "definition": content.get("Definition"),
            "positive_examples": content.get("Positive Examples"),
        }
        instances = content.get("Instances")
        for number, instance in enumerate(instances if isinstance(instances, list) else []):
            record = instance if isinstance(instance, dict) else {}
            by_task[task].append({"id": f"{task}-{number}", **record, **shared})
    return by_task


def _why_unusable(record: dict[str, Any]) -> str | None:
    definition, output = record.get("definition"), record.get("output")
    first = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(first, str) or not isinstance(record.get("category"), str):
        return "the instance has no definition or no category"
    if not isinstance(record.get("input"), str) or not isinstance(record.get("id"), str):
        return "the instance has no input or no id"
    if not isinstance(output, list) or not output or not all(isinstance(one, str) for one in output):
        return "the instance has no references"
    if not any(char.isascii() and char.isalnum() for one in output for char in one):
        return "no reference has a letter or digit, which is all that ROUGE-L compares"
    return None


def _is_example(example: Any) -> bool:
    return isinstance(example, dict) and all(isinstance(example.get(key), str) for key in ("input", "output"))


def _ended(text: str) -> str:
    """Tk-Instruct ends every part with a full stop, unless it ends with punctuation already."""
    text = text.strip()
    return text if text and text[-1] in string.punctuation else f"{text}."
