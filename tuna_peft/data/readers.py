"""One reader for each data format; `load` calls it, and `ranked.normalise` then checks and sorts the responses.

A reader keeps the responses in the order of the file, so that errors can name them by their index in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from tuna_peft.data import columns
from tuna_peft.data.bad_row import BadRow, required_list
from tuna_peft.data.config import DataSource, Markers
from tuna_peft.data.dialogues import (
    dialogue_prompt,
    dialogue_responses,
    has_replies,
    is_dialogue,
    preference_prompt,
    preference_responses,
)
from tuna_peft.data.grouping import Group, merge_responses
from tuna_peft.data.in_text import parsed
from tuna_peft.data.messages import DIALOGUE_KEYS, PAIR_KEYS
from tuna_peft.data.ranked import Record
from tuna_peft.data.shapes import SHAPES, Shape
from tuna_peft.data.suggest import data_block, suggest, undecided
from tuna_peft.data.teacher_records import read_teacher_prompt, read_teacher_responses
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.transcripts import looks_like_transcripts, read_transcripts
from tuna_peft.data.verdict import Unreadable, own_response, read_verdict
from tuna_peft.errors import UserError, listed


@dataclasses.dataclass(frozen=True)
class Format:
    """A data format: how to recognize and read its records.

    Args:
        name: Its name in recipes.
        keys: The keys of its records, for error messages.
        reads: All keys of a record that are read, but `id`, `system` and `tools`.
        matches: Whether a record (without its null values) has this format.
        prompt: (raw, source, template, where) -> (id or None, prompt).
        responses: (raw, source, template, where) -> completions, scores, ranks, reference, in the order of the file.
    """

    name: str
    keys: str
    reads: frozenset[str]
    matches: Callable[[Record], bool]
    prompt: Callable[[Record, DataSource, PromptTemplate, str], tuple[Any, Any]]
    responses: Callable[[Record, DataSource, PromptTemplate, str], Record]


def choose_format(
    source: DataSource, first: Record, where: str, *, prompts_only: bool = False
) -> tuple[Format, DataSource]:
    """The format that the source names, or, for `auto`, the one detected from the keys of its first record.

    Args:
        source: Has `format` and `columns`.
        first: The first record.
        where: Its place, for errors.
        prompts_only: Accept records with a `prompt` or an `instruction` and no responses.

    Returns:
        The format, and the source with the `columns` and `group_by` of a public data set if it is one.

    Raises:
        UserError: The keys match no format, or two of them, or `length_penalty` is given for a format that does not
            use it.
    """
    name: str = "columns" if source.columns is not None else source.format
    if name == "auto":
        present = {key: value for key, value in first.items() if value is not None}
        fitting = [format.name for format in FORMATS.values() if format.matches(present)][:1]
        fitting += [shape for shape in SHAPES if SHAPES[shape].matches(present)]
        if not prompts_only and (len(fitting) > 1 or "labels" in fitting):
            raise undecided(fitting, where)
        if prompts_only:
            fitting += [reads for key, reads in (("prompt", "ranked"), ("instruction", "alpaca")) if key in present]
        name = fitting[0] if fitting else "auto"
        if name in _ONE_RESPONSE and isinstance(first.get("label"), bool):
            raise UserError(
                "each record has one response and a `label`: supervised training would imitate bad responses too",
                where=where,
                fix="To rank the responses of a prompt, where there are several: "
                f"`{_ONE_RESPONSE[name]}`. To train on every response all the same: `format: {name}`.",
            )
    if name == "auto":
        raise UserError(
            f"no known format has the keys {listed(f'`{key}`' for key in first)}",
            where=where,
            fix=_unknown(source, first),
        )
    if source.markers is not None and name != "transcript":
        what = f"`markers` has no effect on data in the `{name}` format"
        raise UserError(what, where=source.title, fix="Remove it, or set `format: transcript`.")
    if source.length_penalty is not None and name != "teacher":
        raise UserError(
            f"`length_penalty` has no effect on data in the `{name}` format",
            where=source.title,
            fix="Remove it; it applies to the log-probabilities of `format: teacher`.",
        )
    if name in SHAPES:
        return dataclasses.replace(FORMATS["columns"], name=name), SHAPES[name].apply(source)
    return FORMATS[name], source


# Formats with one response a record, and how to rank those of a prompt by a label.
_ONE_RESPONSE = {
    "messages": "columns: {instruction: 'messages[0].content', completions: [messages], scores: [label]}, "
    "group_by: 'messages[0].content'",
    "alpaca": "columns: {instruction: instruction, input: input, completions: output, scores: label}, "
    "group_by: [instruction, input]",
}


def fits(source: DataSource, first: Record) -> bool:
    """Whether a record has the keys that the source's format or columns name."""
    present = {key: value for key, value in first.items() if value is not None}
    if source.columns is not None:
        given = source.columns.model_dump(exclude_none=True, exclude={"winner_labels", "input", "system", "reference"})
        group = [source.group_by] if isinstance(source.group_by, str) else source.group_by or []
        paths = [path for value in given.values() for path in ([value] if isinstance(value, str) else value)]
        return Shape(tuple(path for path in (*paths, *group) if path != "best_first"), {}).matches(first)
    kinds: dict[str, Format | Shape] = {**FORMATS, **SHAPES}
    known = kinds.values() if source.format == "auto" else [kinds[source.format]]
    return any(kind.matches(present) for kind in known)


def grouped(format: Format) -> Format:
    """The format for rows that `group_rows` has collected: their responses are merged."""

    def responses(group: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
        assert isinstance(group, Group)
        rows, errors = [], []
        for place, row in group.rows:
            try:
                read = (place, format.responses(row, source, template, place))
                merge_responses([read])
                rows.append(read)
            except BadRow as error:  # one row that cannot be used does not spoil the others of its prompt
                errors.append(error)
        merged = merge_responses(rows)
        if errors and (source.on_bad_row == "error" or len(merged["completions"]) < 2):
            raise errors[0]
        return {**merged, "omitted": len(errors)}

    return dataclasses.replace(format, responses=responses)


_TABLE = "After a command: --column PART=PATH for each of them. All formats: docs/data-formats.md."


def _unknown(source: DataSource, first: Record) -> str:
    """The fix for records of no known format."""
    for key, text in (("messages", "content"), ("conversations", "value")):
        if key in first:
            return (
                f"Its turns have no `role` (or `from`). Say which to use, `columns: {{instruction: {key}[0].{text}, "
                f"completions: {key}[1].{text}}}`. With one reply per prompt it can be supervised data, or prompts to "
                "sample from; ranking needs several replies per prompt, with scores."
            )
    settings, missing = suggest(first)
    if not missing:
        return "\n  ".join(["Perhaps this reads it; in a recipe:", *data_block(source, settings).splitlines(), _TABLE])
    known = "; ".join(f"{format.name} ({format.keys})" for format in FORMATS.values() if format.name != "columns")
    return (
        "Name the columns: `columns: {instruction: question, completions: answers[].text, scores: "
        "answers[].score}` in a recipe, `--column instruction=question --column ...` after a command. "
        f"Known formats: {known}. To decide: {'; '.join(missing)}."
    )


def _full_prompt(key: str) -> Callable[[Record, DataSource, PromptTemplate, str], tuple[Any, Any]]:
    """Reads a field that is a full prompt; no template is applied."""
    return lambda raw, source, template, where: (raw.get("id"), raw.get(key))


# ranked: prompt, completions, scores or ranks, reference, id


def _ranked_responses(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
    """Lists may be text, and so may numbers: a table has nothing else."""
    lists = {key: parsed(raw.get(key), "[") for key in ("completions", "scores", "ranks")}
    for key in ("scores", "ranks"):
        if isinstance(lists[key], list):
            lists[key] = [columns.as_number(value) for value in lists[key]]
    return {**lists, "reference": raw.get("reference")}


# judge: instruct, generation [N], rank or ranks (indices, best first), response_N (the judge's own), gpt_eval, id


def _judge_responses(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
    """The reference's records: `gpt_eval`, the judge's whole answer, corrects what its writer took from it.

    That writer (microsoft/LMOps, tuna/src/gpt-eval.py) keeps only the first paragraph of the judge's own response, and
    takes every number after "rank:" for a rank.
    """
    responses = list(required_list(raw, "generation", where))
    count = len(responses)
    order = required_list(raw, "rank" if raw.get("rank") is not None else "ranks", where)
    own, answer, read = raw.get(f"response_{count}"), raw.get("gpt_eval"), None
    if isinstance(answer, str):
        with contextlib.suppress(Unreadable):
            read = list(read_verdict(answer, count).order)
        own = own_response(answer, count) or own
    numbers = [int(entry) if isinstance(entry, str) and entry.strip().isdigit() else entry for entry in order]
    if isinstance(own, str) and own.strip():
        responses.append(own)
    elif count in (read or numbers):  # it is ranked, but the record does not hold it
        numbers, read = ([index for index in one or [] if index != count] for one in (numbers, read))
    ranks: list[int | None] = [None] * len(responses)
    for place, index in enumerate(read or numbers):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(responses):
            what = f"entry {place} of the rank is {order[place]!r}, not the index of one of {len(responses)} responses"
            raise BadRow(what, reason="bad rank", where=where)
        if ranks[index] is not None:
            raise BadRow(f"the rank names response {index} twice", reason="bad rank", where=where)
        ranks[index] = place
    # normalise() merges duplicates of ranked responses, and drops and counts the others that are not ranked.
    return {
        "completions": responses,
        "scores": None,
        "ranks": ranks,
        "reference": None,
        "comparisons": int(bool(read)),
        "contradictions": int(bool(read) and read != numbers),
    }


# formatted: instruction (a full prompt), output [N], score [N], id


def _formatted_responses(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
    return {
        "completions": required_list(raw, "output", where),
        "scores": required_list(raw, "score", where),
        "reference": None,
    }


# alpaca: instruction, input, output


def _alpaca_prompt(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> tuple[Any, Any]:
    if raw.get("history"):  # LLaMA-Factory's
        what = "the record has `history` (earlier turns), which would be lost"
        raise BadRow(what, reason="history", where=where, fix="Write all turns as `messages`.")
    return raw.get("id"), columns.render(template, raw.get("instruction"), raw.get("input"), where)


def _alpaca_responses(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
    return {"completions": [raw.get("output")], "scores": None, "ranks": [0], "reference": None}


# transcript: chosen, rejected (whole dialogues in plain text)


def _transcript_prompt(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> tuple[Any, Any]:
    return raw.get("id"), read_transcripts(raw, source.markers or Markers(), template.name == "chat", where)[0]


def _transcript_responses(raw: Record, source: DataSource, template: PromptTemplate, where: str) -> Record:
    responses = read_transcripts(raw, source.markers or Markers(), template.name == "chat", where)[1]
    return {"completions": responses, "scores": None, "ranks": [0, 1], "reference": None}


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "ranked",
            "prompt, completions, scores or ranks",
            _keys("prompt completions scores ranks reference"),
            lambda raw: {"prompt", "completions"} <= raw.keys() and ("scores" in raw or "ranks" in raw),
            _full_prompt("prompt"),
            _ranked_responses,
        ),
        Format(
            "teacher",
            "orig, text, logprob or avg_token_prob, length",
            _keys("orig text logprob avg_token_prob length"),
            lambda raw: {"orig", "text"} <= raw.keys() and ("logprob" in raw or "avg_token_prob" in raw),
            read_teacher_prompt,
            read_teacher_responses,
        ),
        Format(
            "judge",
            "instruct, generation, rank or ranks",
            _keys("instruct generation rank ranks gpt_eval") | {f"response_{count}" for count in range(100)},
            lambda raw: {"instruct", "generation"} <= raw.keys() and ("rank" in raw or "ranks" in raw),
            _full_prompt("instruct"),
            _judge_responses,
        ),
        Format(
            "formatted",
            "instruction, output and score as lists",
            _keys("instruction output score"),
            lambda raw: {"instruction", "score"} <= raw.keys() and isinstance(raw.get("output"), list),
            _full_prompt("instruction"),
            _formatted_responses,
        ),
        Format(
            "preference",
            "chosen, rejected, and prompt, conversations or messages before them or in them",
            frozenset((*PAIR_KEYS, *DIALOGUE_KEYS)),
            has_replies,
            lambda raw, source, template, where: (raw.get("id"), preference_prompt(raw)),
            lambda raw, source, template, where: preference_responses(raw, where),
        ),
        Format(
            "transcript",
            "chosen, rejected as texts with turns marked by Human: and Assistant:",
            _keys("chosen rejected"),
            looks_like_transcripts,
            _transcript_prompt,
            _transcript_responses,
        ),
        Format(
            "messages",
            "messages or conversations",
            frozenset((*DIALOGUE_KEYS, "systemInstruction")),
            is_dialogue,
            lambda raw, source, template, where: (raw.get("id"), dialogue_prompt(raw, where)),
            lambda raw, source, template, where: dialogue_responses(raw, where),
        ),
        Format(
            "alpaca",
            "instruction, input, output",
            _keys("instruction input output history"),
            lambda raw: "instruction" in raw and isinstance(raw.get("output"), str),
            _alpaca_prompt,
            _alpaca_responses,
        ),
        Format(
            "columns",
            "any, with `columns`",
            frozenset(),
            lambda raw: False,
            lambda raw, source, template, where: columns.read_prompt(raw, source.columns, template, where),
            lambda raw, source, template, where: columns.read_responses(raw, source.columns, template, where),
        ),
    )
}
