"""Lengths of all data that a recipe reads: counted for files on this machine, assumed for data that is not.

`tuna-peft plan` counts a sample of each file; at the start of a run the encoded data gives exact lengths.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuna_peft.data.config import DataSource, Overflow, PromptConfig
from tuna_peft.data.ranked import Record, response_text
from tuna_peft.data.sources import count_selected, is_here
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.texts import set_template_date
from tuna_peft.evaluation.lmentry.task import read_lmentry
from tuna_peft.evaluation.session import Question
from tuna_peft.evaluation.superni import read_superni, superni_questions
from tuna_peft.evaluation.vicuna import read_vicuna_questions
from tuna_peft.feedback.protocol import judge_messages
from tuna_peft.limits import within_context
from tuna_peft.planning.prompt_check import warn_of_default_template
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ASSUMED_HELD_OUT, ASSUMED_RESPONSES, ASSUMED_ROWS, Row, Workload
from tuna_peft.recipe.evaluation_schema import LMentryTask, RankingTask, SuperNITask, VicunaTask
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages
from tuna_peft.recipe.schema import Recipe

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("tuna_peft")

Kind = Literal["sft", "ranking", "prompts", "candidates"]

# Examples that a plan tokenizes: the longest by characters, and a number spread evenly over the rest.
LONGEST, SPREAD = 200, 800
# Used without a tokenizer. Alpaca-style English has 3.7 to 4.6 characters a token with the tokenizers of LLaMA to
# Qwen3; a smaller number gives an upper bound of the length.
CHARACTERS_PER_TOKEN = 3.5
_BY_CHARACTERS = f"estimated from characters, {CHARACTERS_PER_TOKEN} for a token (no tokenizer)"

# Benchmarks that are not on this machine: typical and longest prompts, in LLaMA's tokens with the Alpaca template. For
# Super-NI by the number of shots.
_SUPERNI_TASKS = 119
_SUPERNI = {0: (230, 2950), 2: (430, 3600)}
_LMENTRY_TASKS, _LMENTRY_EXAMPLES, _LMENTRY = (
    41,
    900,
    (60, 90),
)  # examples of each template; a task has three templates
_VICUNA_QUESTIONS, _VICUNA = 80, (60, 80)


def read_workloads(recipe: Recipe, shape: ModelShape) -> dict[str, Workload]:
    """Lengths by stage name and by `evaluation.<task>`; a task with several numbers of shots has one entry for each.

    For a stage whose training data the run makes, they are the prompts, each with the longest responses that may be
    sampled for it or with the responses in the file.

    Raises:
        UserError: A file cannot be used.
    """
    tokenizer = recipe_tokenizer(recipe) if any(is_here(source.path) for source in recipe.sources().values()) else None
    warn_of_default_template(recipe, tokenizer)
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
    tasks = recipe.named_evaluation.tasks.given() if recipe.named_evaluation else {}
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
                workloads[f"evaluation.{result}"] = _within_context(found, shape, task.max_new_tokens)
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
        if stage.type == "sft":  # the best response only
            responses = (max(responses),)
        if longest is None:
            return Row(row.prompt, responses)
        prompt = min(row.prompt, longest - 1)  # a longer prompt is truncated or skipped
        return Row(prompt, tuple(min(response, longest - prompt) for response in responses))

    return dataclasses.replace(prompts, rows=tuple(map(within, prompts.rows)))


def questions(rows: Workload, both_orders: bool, guidance: str | None) -> Workload:
    """Prompts of a local judge: its instructions, a prompt, and all responses to it."""

    def question(row: Row) -> Row:
        rules = judge_messages("", [""] * len(row.responses), guidance)[0]["content"]
        return Row(round(len(rules) / CHARACTERS_PER_TOKEN) + row.tokens, (0,))

    total = rows.total * (2 if both_orders else 1)
    return Workload(tuple(map(question, rows.rows)), total, f"{total:,} questions")


def _benchmark(
    name: str, task: SuperNITask | LMentryTask | VicunaTask, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[str, Workload]]:
    """The name of each result of a benchmark, with the lengths of its prompts."""
    path = Path(task.path).expanduser()
    template = PromptTemplate(recipe.prompt if task.wrap else PromptConfig(template="none"))
    if isinstance(task, SuperNITask):
        instances = read_superni(path, task.tasks, task.per_task)[0] if path.exists() else []
        for shots in task.shots:
            asked = superni_questions(instances, shots, template)[0]
            total = len(task.tasks or [0] * _SUPERNI_TASKS) * task.per_task
            sizes = _SUPERNI.get(shots, _SUPERNI[2])
            yield f"{name}-{shots}shot", _asked(asked, tokenizer, total, sizes)
    elif isinstance(task, LMentryTask):
        asked = read_lmentry(path, template, task.tasks, task.per_template)[0] if path.exists() else []
        total = len(task.tasks or [0] * _LMENTRY_TASKS) * 3 * min(task.per_template or 1000, _LMENTRY_EXAMPLES)
        yield name, _asked(asked, tokenizer, total, _LMENTRY)
    else:
        asked = read_vicuna_questions(path, template)[0] if path.exists() else []
        yield name, _asked(asked, tokenizer, _VICUNA_QUESTIONS, _VICUNA)


def _asked(
    asked: list[Question], tokenizer: PreTrainedTokenizerBase | None, total: int, sizes: tuple[int, int]
) -> Workload:
    if asked:
        return records_workload([{"prompt": question.prompt} for question in asked], tokenizer)
    typical, longest = sizes
    note = f"assumed: {total:,} prompts of {typical} tokens, up to {longest:,}"
    return Workload.of_prompts(total, typical, longest, note)


def _within_context(workload: Workload, shape: ModelShape, new: int) -> Workload:
    """Shortens prompts that leave no `new` tokens of the context for an answer; evaluation skips them."""
    if shape.context is None:
        return workload
    rows = tuple(Row(min(row.prompt, max(shape.context - new, 1)), row.responses) for row in workload.rows)
    return dataclasses.replace(workload, rows=rows)


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None if it cannot be read, as a plan can do without it."""
    from transformers import AutoTokenizer

    from tuna_peft.models.base.load import resolve_model_path

    try:
        name = resolve_model_path(recipe.base.model)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=recipe.base.revision)
        set_template_date(tokenizer, recipe.prompt.date)
        return tokenizer
    except (OSError, ValueError):
        logger.warning("%s: its tokenizer cannot be read; lengths are estimated from characters", recipe.base.model)
        return None


def encoded_workload(dataset: datasets.Dataset) -> Workload:
    """The exact lengths of encoded examples, ranked or supervised, see `tuna_peft.data.tokenize.encode_dataset`."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length
    table: Any = dataset.with_format("arrow")[:]
    if "completions_ids" in table.column_names:
        responses = iter(lengths(pyarrow.compute.list_flatten(table["completions_ids"])).to_pylist())
        counts = lengths(table["completions_ids"]).to_pylist()
        rows = [
            Row(prompt, tuple(next(responses) for _ in range(count)))
            for prompt, count in zip(lengths(table["prompt_ids"]).to_pylist(), counts, strict=True)
        ]
    else:
        targets = [sum(mask) for mask in table["completion_mask"].to_pylist()]
        whole = lengths(table["input_ids"]).to_pylist()
        rows = [Row(length - own, (own,)) for length, own in zip(whole, targets, strict=True)]
    return Workload(tuple(rows), len(rows), f"counted in tokens: {len(rows):,} rows")


def source_workload(
    source: DataSource,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    kind: Kind,
    max_length: int | None = None,
    overflow: Overflow = "skip",
    assumed: int = ASSUMED_ROWS,
) -> Workload:
    """The lengths of a data set: counted in a file on this machine, assumed for any other.

    Args:
        source: The data set.
        recipe: For its prompt template.
        tokenizer: The model's; without it lengths are estimated from characters.
        kind: What is read: `prompts` alone, or `candidates`, which may have responses.
        max_length: Maximum tokens of a prompt with a response.
        overflow: What happens to longer ones.
        assumed: Number of examples in a data set that is not on this machine, before its slice.

    Raises:
        UserError: The file cannot be used.
    """
    if not is_here(source.path):
        total = count_selected(source, assumed)
        sliced = "[" in source.split
        how = f" ({source.split} of {assumed:,})" if sliced and total < assumed else ""
        responses = {"sft": 1, "prompts": 0}.get(kind, ASSUMED_RESPONSES)
        return Workload.assumed(responses, max_length, total, how)

    from tuna_peft.data.load import load_candidates, load_prompts, load_ranked, load_sft

    if kind in ("prompts", "candidates"):
        read = load_prompts if kind == "prompts" else load_candidates
        return records_workload(read(source, recipe.prompt)[0], tokenizer)

    dataset = (load_sft if kind == "sft" else load_ranked)(source, recipe.prompt)[0]
    chosen = dataset.select(_sample(range(len(dataset)), key=lambda index: _characters(dataset[index])))
    if tokenizer is None:
        return _by_characters(chosen, len(dataset))
    from tuna_peft.data.tokenize import encode_dataset

    encoded, _ = encode_dataset(
        chosen, tokenizer, max_length=max_length, overflow=overflow, prompt=recipe.prompt, on_bad_row=source.on_bad_row
    )
    part = f", from {len(chosen):,} of them" if len(chosen) < len(dataset) else ""
    workload = encoded_workload(encoded)
    total = round(len(dataset) * len(encoded) / len(chosen))
    return dataclasses.replace(workload, total=total, source=f"counted in tokens: {len(dataset):,} rows{part}")


def records_workload(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | None) -> Workload:
    """The lengths of prompts and of their responses, if they have any; of a sample where there are many.

    Args:
        records: Dictionaries with `prompt` and optional `completions`.
        tokenizer: The model's; without it lengths are estimated from characters.
    """
    responses = any(record.get("completions") for record in records)
    note = f"{len(records):,} prompts{' with responses' if responses else ''}"
    if tokenizer is None:
        rows = [
            Row(_in_tokens(record["prompt"]), tuple(map(_in_tokens, record.get("completions") or [""])))
            for record in records
        ]
        return Workload(tuple(rows), len(records), f"{note}, {_BY_CHARACTERS}")
    from tuna_peft.data.texts import TextTokenizer, prompt_ids

    tokens, rows = TextTokenizer(tokenizer), []
    for record in _sample(records, key=_characters):
        texts = [response_text(response) for response in record.get("completions") or []]
        lengths = [len(ids) + 1 for ids in tokens(texts, special=False)] if texts else [0]  # EOS is part of it
        rows.append(Row(len(prompt_ids(record["prompt"], tokenizer, record.get("tools"))), tuple(lengths)))
    return Workload(tuple(rows), len(records), note)


def _sample(items: Any, key: Any) -> list[Any]:
    """The longest items, and some of the others."""
    if len(items) <= LONGEST + SPREAD:
        return list(items)
    by_length = sorted(items, key=key, reverse=True)
    rest = by_length[LONGEST:]
    return by_length[:LONGEST] + rest[:: max(len(rest) // SPREAD, 1)]


def _by_characters(dataset: datasets.Dataset, total: int) -> Workload:
    rows = []
    for record in dataset:
        responses = record.get("completions") or [record["completion"]]
        rows.append(Row(_in_tokens(record["prompt"]), tuple(map(_in_tokens, responses))))
    return Workload(tuple(rows), total, f"{total:,} rows, {_BY_CHARACTERS}")


def _in_tokens(text: Any) -> int:
    return round(_characters(text) / CHARACTERS_PER_TOKEN) + 1


def _characters(part: Any) -> int:
    """Number of characters of a text, of messages, or of all texts of a record."""
    if isinstance(part, str):
        return len(part)
    if isinstance(part, dict):
        texts = (part.get(key) for key in ("prompt", "completion", "completions", "content"))
        return sum(_characters(text) for text in texts if text)
    return sum(map(_characters, part))
