"""From a source in a recipe to a data set: ranked, supervised, or prompts alone; as text, or tokenized.

`tuna_peft.run` reads training and held-out rows through `encode_source`; feedback and planning read text with
the `load_*` functions. Below: `sources` opens files and Hub data sets, `readers` knows their formats, `ranked` checks
and normalizes records, `tokenize` turns them into token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from tuna_peft.data.as_dataset import ranked_dataset, supervised_dataset
from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.columns import one
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.grouping import group_rows
from tuna_peft.data.llama_factory import resolve_entry
from tuna_peft.data.messages import clean_tools
from tuna_peft.data.ranked import (
    Normalised,
    Prompt,
    ReadReport,
    Record,
    Response,
    add_reference,
    clean_prompt,
    clean_response,
    normalise,
    record_id,
    require_few,
    response_key,
    split_dialogues,
    with_system,
)
from tuna_peft.data.readers import Format, choose_format, grouped
from tuna_peft.data.sources import RawRecords, read_records
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.texts import prompt_text
from tuna_peft.data.tokenize import Overflow, encode_records, require_known_ids, require_scores
from tuna_peft.errors import UserError
from tuna_peft.limits import context_length, within_context
from tuna_peft.progress import tracked

if TYPE_CHECKING:
    import datasets
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_FIRST = 20  # records that are looked at for their format
Placed = tuple[str, Record]  # a record's place in its file, and the record
Select = Callable[[Iterable[Placed]], Iterable[Placed]]


def encode_source(
    source: DataSource,
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    supervised: bool = False,
    max_length: int | None,
    overflow: Overflow,
    needs_reference: bool = False,
    needs_scores: bool = False,
    select: Select | None = None,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Reads and tokenizes the data of a recipe's stage or task: the one call from a source to training rows.

    The rows are on the disk, and records are read as they are encoded: memory does not grow with their number.

    Args:
        source: What the recipe says of the data.
        prompt: The recipe's prompt template.
        tokenizer: The model's tokenizer.
        config: The model's configuration; its context length bounds `max_length`.
        supervised: Use only the best response of each record, as `load_sft`.
        max_length, overflow, needs_reference: See `tuna_peft.data.tokenize.encode_ranked`.
        needs_scores: A record with ranks alone is an error.
        select: Picks the records to encode from those that are read; None encodes all.

    Returns:
        Rows as `tuna_peft.data.tokenize.encode_dataset` returns them, and the counts of records and rows that were
        read, skipped and truncated.

    Raises:
        UserError: As `load_ranked` and `encode_dataset`; names the file and the record's place in it.
    """
    report = ReadReport()
    placed: Iterable[Placed] = iterate_ranked(source, prompt, report, pairs=not supervised)
    if select is not None:
        placed = select(placed)
    if supervised:
        placed = ((where, best_alone(record)) for where, record in placed)
    try:
        encoded, tokens = encode_records(
            placed, None, tokenizer, sft=supervised, overflow=overflow, needs_reference=needs_reference,
            max_length=within_context(max_length, context_length(config)), prompt=prompt, on_bad_row=source.on_bad_row,
        )  # fmt: skip
        if (vocabulary := getattr(config.get_text_config(), "vocab_size", None)) is not None:
            require_known_ids(encoded, tokenizer, vocabulary)
        if needs_scores:
            require_scores(encoded)
    except UserError as error:
        raise UserError(error.what, where=error.where or source.title, fix=error.fix) from error
    return encoded, {**report.as_dict(), "tokens": tokens.as_dict()}


def load_ranked(source: DataSource, prompt: PromptConfig) -> tuple[datasets.Dataset, ReadReport]:
    """Reads ranked responses.

    Returns:
        A data set with the columns `id`, `prompt`, `completions`, `scores`, `ranks`, `reference` (the ranked type),
        and the counts.

    Raises:
        UserError: The source cannot be read, a record is invalid (unless `on_bad_row` is `skip`), or none is left.
    """
    records, report = read_ranked(source, prompt)
    return ranked_dataset(records), report


def load_sft(source: DataSource, prompt: PromptConfig) -> tuple[datasets.Dataset, ReadReport]:
    """Reads prompts with one response each: where there are several, the best one.

    Returns:
        A data set in TRL's prompt-completion type (`id`, `prompt`, `completion`; lists of messages with `template:
        chat`), and the counts of what was read.

    Raises:
        UserError: See `load_ranked`, but one response, or tied ones, are enough.
    """
    records, report = read_ranked(source, prompt, pairs=False)
    return supervised_dataset(records), report


def load_prompts(source: DataSource, prompt: PromptConfig) -> tuple[list[Record], ReadReport]:
    """Reads only the prompts, from any format; the records need no responses.

    Returns:
        A list of `{"id", "prompt", "reference", "record"}` (`reference` is the response that came with the prompt, or
        None; `record` is the raw one), and the counts.

    Raises:
        UserError: See `load_ranked`.
    """
    return _read_unranked(source, prompt, "reading prompts", _prompt_alone)


def load_candidates(source: DataSource, prompt: PromptConfig) -> tuple[list[Record], ReadReport]:
    """Reads responses that are to be scored or judged, from any format; existing ranks and scores are ignored.

    Returns:
        A list of `{"id", "prompt", "completions", "reference", "record"}`, the completions in the order of the file
        with exact duplicates merged, and the counts. `record` is the record that the prompt came from: the raw one, or
        its `record` key, which files of samples have.

    Raises:
        UserError: See `load_ranked`, but one response is enough.
    """
    return _read_unranked(source, prompt, "reading responses", _with_responses)


def renderable(
    prompts: list[Record], tokenizer: PreTrainedTokenizerBase, source: DataSource, report: ReadReport
) -> list[Record]:
    """The prompts that the chat template renders; `report` counts the others.

    Raises:
        UserError: It refuses one, and `on_bad_row` is `error`; or it refuses all.
    """
    kept = []
    for row in prompts:
        try:
            prompt_text(row["prompt"], tokenizer, f"{source.title}: {row['id']}", row.get("tools"))
            kept.append(row)
        except BadRow as error:
            _skip(error, source, report)
    report.kept = len(kept)
    _require_some(report, source)
    return kept


def read_ranked(source: DataSource, prompt: PromptConfig, *, pairs: bool = True) -> tuple[list[Record], ReadReport]:
    """The records of `load_ranked` as a list; `pairs=False` also accepts records with one response or all tied."""
    report = ReadReport()
    return [record for _, record in iterate_ranked(source, prompt, report, pairs=pairs)], report


def iterate_ranked(source: DataSource, prompt: PromptConfig, report: ReadReport, *, pairs: bool) -> Iterator[Placed]:
    """The records of `read_ranked` with their places, read as they are asked for; `report` is complete at the end."""
    first: list[Prompt] = []  # the first prompt, once there is one

    def build(raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate) -> Normalised:
        normalised = _read_one(raw, where, format, source, template, pairs)
        prompt = normalised.record["prompt"]
        if first and isinstance(prompt, str) != isinstance(first[0], str):
            what = "the prompt is text in some records and messages in others"
            raise BadRow(what, reason="wrong type", where=where)
        first[:] = [prompt]
        return normalised

    return _read(source, prompt, "reading responses", build, report)


def source_format(source: DataSource) -> tuple[str, DataSource]:
    """The name of the source's format, detected from its first record where it is `auto`, and what it reads it as.

    Returns:
        The name, and the source with the `format` or the `columns` that say the same without looking at the data.
    """
    source = resolve_entry(source)
    format, read_as, _ = _format(source)
    name = "columns" if read_as.columns is not None else format.name
    return format.name, read_as.model_copy(update={"format": name})


def best_alone(record: Record) -> Record:
    """A normalised record with only its best response, as supervised stages use it."""
    return {
        **record,
        "completions": record["completions"][:1],
        "scores": record["scores"] and record["scores"][:1],
        "ranks": [0],
        "reference": None,
    }


def _read(
    source: DataSource,
    prompt: PromptConfig,
    what: str,
    build: Callable[[Record, str, Format, DataSource, PromptTemplate], Normalised],
    report: ReadReport,
    *,
    prompts_only: bool = False,
) -> Iterator[Placed]:
    """What `build` makes of each raw record, with invalid ones skipped and counted where the source allows it."""
    format, source, raw_records = _format(resolve_entry(source), prompts_only=prompts_only)
    template = PromptTemplate(prompt)
    if source.group_by is not None:
        raw_records, format = group_rows(raw_records, source), grouped(format)
    for where, raw in tracked(raw_records, what, "records"):
        report.read += 1
        try:
            built = build(raw, where, format, source, template)
        except BadRow as error:
            _skip(error, source, report)
            continue
        report.kept += 1
        report.duplicates_merged += built.merged
        report.omitted += built.omitted
        report.contradictions += built.contradictions
        report.comparisons += built.comparisons
        if built.contradictions and report.first_contradiction is None:
            report.first_contradiction = where
        report.responses += len(built.record.get("completions", ())) + built.merged + built.omitted
        yield where, built.record
    _require_some(report, source)


def _skip(error: BadRow, source: DataSource, report: ReadReport) -> None:
    if source.on_bad_row == "error":
        raise error
    report.skipped[error.reason] = report.skipped.get(error.reason, 0) + 1


def _require_some(report: ReadReport, source: DataSource) -> None:
    if report.kept == 0:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.skipped.items())
        raise UserError(
            f"none of the {report.read} records can be used ({reasons})",
            where=source.title,
            fix="Check `format` and `columns`; with `on_bad_row: error` the message names the first invalid record.",
        )


def _read_unranked(
    source: DataSource,
    prompt: PromptConfig,
    what: str,
    read: Callable[[Record, str, Format, Record, Prompt], tuple[Record, int]],
) -> tuple[list[Record], ReadReport]:
    def build(raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate) -> Normalised:
        identity, given = format.prompt(raw, source, template, where)
        given, found = _responses_of(raw, where, format, source, template, given, optional=read is _prompt_alone)
        given = with_system(clean_prompt(given, where), _system(raw, format, source, where), where)
        row = {"id": record_id(identity, where), "prompt": given}
        rest, merged = read(raw, where, format, found, row["prompt"])
        if tools := clean_tools(raw.get("tools"), where):
            rest["tools"] = tools
        return Normalised({**row, **rest}, merged, omitted=0)

    report = ReadReport()
    return [record for _, record in _read(source, prompt, what, build, report, prompts_only=True)], report


def _responses_of(
    raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate, prompt: Any, optional: bool
) -> tuple[Any, Record]:
    """The prompt and the responses of a record, where responses may be whole dialogues."""
    try:
        found = format.responses(raw, source, template, where)
        prompt, responses = split_dialogues(prompt, found["completions"], where)
        return prompt, {**found, "completions": responses}
    except BadRow:
        if not optional:
            raise
        return prompt, {"completions": [], "reference": None}


def _prompt_alone(raw: Record, where: str, format: Format, found: Record, prompt: Prompt) -> tuple[Record, int]:
    reference = found["completions"][0] if format.name == "alpaca" and found["completions"] else found["reference"]
    if not isinstance(reference, str) or not reference.strip():
        reference = None
    return {"reference": reference, "record": raw}, 0


def _with_responses(raw: Record, where: str, format: Format, found: Record, prompt: Prompt) -> tuple[Record, int]:
    responses = found["completions"]
    if not isinstance(responses, list) or not responses:
        raise BadRow("the record has no responses", reason="no responses", where=where)
    require_few(len(responses), where)
    cleaned = [clean_response(one, prompt, f"{where}, candidate {index}") for index, one in enumerate(responses)]
    distinct: dict[str, Response] = {}
    for response in cleaned:
        distinct.setdefault(response_key(response), response)
    reference = found["reference"]
    rest = {
        "completions": list(distinct.values()),
        "reference": None if reference is None else clean_response(reference, prompt, f"{where}, reference"),
        "record": raw.get("record", raw),
    }
    return rest, len(cleaned) - len(distinct)


def _system(raw: Record, format: Format, source: DataSource, where: str) -> Any:
    """The system message of a record, beside its prompt; of Gemini's, its parts."""
    if source.columns is not None and (format.name == "columns" or source.columns.system is not None):
        return None if source.columns.system is None else one(raw, source.columns.system, where)
    given = raw.get("system", raw.get("systemInstruction"))
    return given.get("parts") if isinstance(given, dict) else given


def _read_one(
    raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate, pairs: bool
) -> Normalised:
    identity, prompt = format.prompt(raw, source, template, where)
    found = format.responses(raw, source, template, where)
    record = {"id": identity, "prompt": prompt, "tools": raw.get("tools"), **found}
    record["system"] = _system(raw, format, source, where)
    # The reference can make the only pair, so pairs are required after it is added.
    built = normalise(record, where, pairs=pairs and not source.add_reference)
    built.merged, built.omitted = built.merged + found.get("merged", 0), built.omitted + found.get("omitted", 0)
    built.contradictions, built.comparisons = found.get("contradictions", 0), found.get("comparisons", 0)
    if source.add_reference is not None:
        second = normalise(add_reference(built.record, source.add_reference, where), where, pairs=pairs)
        built.record, built.merged = second.record, built.merged + second.merged
    return built


def _format(source: DataSource, *, prompts_only: bool = False) -> tuple[Format, DataSource, RawRecords]:
    """The source's format, what it is read as, and its records."""
    raw_records, seen = read_records(source), []
    for where, record in raw_records:
        seen.append((where, record))
        try:
            format, read_as = choose_format(source, record, where, prompts_only=prompts_only)
            break
        except UserError:
            # A record with missing values may lack what tells its format.
            if None not in record.values() or len(seen) == _FIRST:
                raise
    else:
        format, read_as = choose_format(source, seen[0][1], seen[0][0], prompts_only=prompts_only)
    return format, read_as, chain(seen, raw_records)
