"""The lengths of all that a recipe reads, for a plan: of files that are here, and typical ones for what is not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.evaluation.lmentry.task import read_lmentry
from tuna_peft.evaluation.session import Question
from tuna_peft.evaluation.superni import read_superni, superni_questions
from tuna_peft.evaluation.vicuna import read_vicuna_questions
from tuna_peft.feedback.protocol import judge_messages
from tuna_peft.limits import within_context
from tuna_peft.planning.lengths import CHARACTERS_PER_TOKEN, is_here, records_workload, source_workload
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ASSUMED_HELD_OUT, Row, Workload
from tuna_peft.recipe.evaluation_schema import LMentryTask, RankingTask, SuperNITask, VicunaTask
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages
from tuna_peft.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("tuna_peft")

# Benchmarks that are not here, in LLaMA's tokens within the Alpaca prompt: typical and longest prompts.
_SUPERNI_TASKS = 119
_SUPERNI = {0: (230, 2950), 2: (430, 3600)}
_LMENTRY_TASKS, _LMENTRY_EXAMPLES, _LMENTRY = 41, 900, (60, 90)  # examples of a template; a task has three
_VICUNA_QUESTIONS, _VICUNA = 80, (60, 80)


def read_workloads(recipe: Recipe, shape: ModelShape) -> dict[str, Workload]:
    """By stage name, and under `evaluation.<task>`, with a name for each number of shots.

    Of a stage whose rows the run makes they are the prompts with the longest responses that it may draw to them, or
    with those that stand in the file.

    Raises:
        UserError: A file that cannot be used.
    """
    tokenizer = _tokenizer(recipe) if any(map(is_here, recipe.sources().values())) else None
    workloads: dict[str, Workload] = {}
    for stage in resolve_stages(recipe):
        options: dict[str, Any] = {"kind": "prompts" if stage.generated else "candidates"}
        if stage.feedback is None:
            options = {
                "kind": stage.type,
                "max_length": within_context(stage.max_length, shape.context),
                "overflow": stage.overflow,
            }
        workloads[stage.name] = prompt_workload(stage, source_workload(stage.source, recipe, tokenizer, **options))
    tasks = recipe.evaluation.tasks.given() if recipe.evaluation else {}
    for name, task in tasks.items():
        if isinstance(task, DataSource):
            options = {"kind": "prompts"}
            if isinstance(task, RankingTask):
                options = {
                    "kind": "ranking",
                    "max_length": within_context(task.max_length, shape.context),
                    "overflow": task.overflow,
                }
            found = source_workload(task, recipe, tokenizer, assumed=ASSUMED_HELD_OUT, **options)
            workloads[f"evaluation.{name}"] = found
        elif isinstance(task, SuperNITask | LMentryTask | VicunaTask):
            for result, found in _benchmark(name, task, recipe, tokenizer):
                workloads[f"evaluation.{result}"] = _with_room(found, shape, task.max_new_tokens)
    return workloads


def prompt_workload(stage: ResolvedStage, source: Workload) -> Workload:
    """The data of a stage, with the longest responses that may be generated for each prompt, if any are."""
    if stage.generated is None:
        return source
    n, longest = stage.generated
    rows = tuple(Row(row.prompt, (longest,) * n) for row in source.rows)
    return Workload(rows, source.total, f"{source.source}, with {n} responses of up to {longest} tokens each")


def ranked_workload(stage: ResolvedStage, prompts: Workload) -> Workload:
    """An upper bound on the training rows that the run makes by ranking the responses to `prompts`."""
    judge, longest = stage.feedback.judge if stage.feedback else None, stage.max_length
    own = judge is not None and judge.include_judge_answer is True

    def within(row: Row) -> Row:
        responses = (*row.responses, *([max(row.responses)] if own else []))
        if longest is None:
            return Row(row.prompt, responses)
        prompt = min(row.prompt, longest - 1)  # what is longer is cut, or its prompt is skipped
        return Row(prompt, tuple(min(response, longest - prompt) for response in responses))

    return dataclasses.replace(prompts, rows=tuple(map(within, prompts.rows)))


def questions(rows: Workload, both_orders: bool, guidance: str | None) -> Workload:
    """What a judge that runs here is asked: its rules, a prompt, and all responses."""

    def question(row: Row) -> Row:
        rules = judge_messages("", [""] * len(row.responses), guidance)[0]["content"]
        return Row(round(len(rules) / CHARACTERS_PER_TOKEN) + row.tokens, (0,))

    total = rows.total * (2 if both_orders else 1)
    return Workload(tuple(map(question, rows.rows)), total, f"{total:,} questions")


def _benchmark(
    name: str, task: SuperNITask | LMentryTask | VicunaTask, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[str, Workload]]:
    """The results of a benchmark by name, with the prompts of each."""
    here = Path(task.path).expanduser()
    template = PromptTemplate(recipe.prompt if task.wrap else PromptConfig(template="none"))
    if isinstance(task, SuperNITask):
        instances = read_superni(here, task.tasks, task.per_task)[0] if here.exists() else []
        for shots in task.shots:
            asked = superni_questions(instances, shots, template)[0]
            total = len(task.tasks or [0] * _SUPERNI_TASKS) * task.per_task
            sizes = _SUPERNI.get(shots, _SUPERNI[2])
            yield f"{name}-{shots}shot", _asked(asked, tokenizer, total, sizes)
    elif isinstance(task, LMentryTask):
        asked = read_lmentry(here, template, task.tasks, task.per_template)[0] if here.exists() else []
        total = len(task.tasks or [0] * _LMENTRY_TASKS) * 3 * min(task.per_template or 1000, _LMENTRY_EXAMPLES)
        yield name, _asked(asked, tokenizer, total, _LMENTRY)
    else:
        asked = read_vicuna_questions(here, template)[0] if here.exists() else []
        yield name, _asked(asked, tokenizer, _VICUNA_QUESTIONS, _VICUNA)


def _asked(
    asked: list[Question], tokenizer: PreTrainedTokenizerBase | None, total: int, sizes: tuple[int, int]
) -> Workload:
    if asked:
        return records_workload([{"prompt": question.prompt} for question in asked], tokenizer)
    typical, longest = sizes
    note = f"assumed: {total:,} prompts of {typical} tokens, up to {longest:,}"
    return Workload.of_prompts(total, typical, longest, note)


def _with_room(workload: Workload, shape: ModelShape, new: int) -> Workload:
    """Without the prompts that an evaluation leaves out: those that leave no room for an answer."""
    if shape.context is None:
        return workload
    rows = tuple(Row(min(row.prompt, max(shape.context - new, 1)), row.responses) for row in workload.rows)
    return dataclasses.replace(workload, rows=rows)


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, where it can be had; a plan goes on without it."""
    from transformers import AutoTokenizer

    from tuna_peft.models.base.load import resolve_model_path

    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(recipe.base.model), revision=recipe.base.revision)
    except (OSError, ValueError):
        logger.warning("%s: its tokenizer cannot be read; lengths are counted in characters", recipe.base.model)
        return None
