"""From a source in a recipe to a data set: ranked, supervised, or prompts alone; as text, or tokenized.

`tuna_peft.run` reads training and held-out rows through `encode_source`; feedback and planning read text with
the `load_*` functions. Below: `sources` opens files and Hub data sets, `readers` knows their formats, `ranked` checks
and normalizes records, `tokenize` turns them into token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.grouping import group_rows
from tuna_peft.data.ranked import (
    BadRow,
    Normalised,
    Prompt,
    ReadReport,
    Record,
    add_reference,
    clean_prompt,
    clean_response,
    normalise,
    record_id,
)
from tuna_peft.data.readers import Format, choose_format, grouped
from tuna_peft.data.sources import RawRecords, read_records
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.tokenize import Overflow, encode_dataset
from tuna_peft.errors import UserError
from tuna_peft.limits import context_length, within_context

if TYPE_CHECKING:
    import datasets
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def encode_source(
    source: DataSource,
    load: Callable[[DataSource, PromptConfig], tuple[datasets.Dataset, ReadReport]],
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    max_length: int | None,
    overflow: Overflow,
    needs_reference: bool = False,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Reads and tokenizes the data of a recipe's stage or task: the one call from a source to training rows.

    Args:
        source: What the recipe says of the data.
        load: `load_ranked` or `load_sft`.
        prompt: The recipe's prompt template.
        tokenizer: The model's tokenizer.
        config: The model's configuration; its context length bounds `max_length`.
        max_length, overflow, needs_reference: See `tuna_peft.data.tokenize.encode_ranked`.

    Returns:
        Rows as `tuna_peft.data.tokenize.encode_dataset` returns them, and the counts of records and rows that were
        read, skipped and truncated.

    Raises:
        UserError: As `load` and `encode_dataset`; names the file.
    """
    dataset, read = load(source, prompt)
    limit = within_context(max_length, context_length(config))
    try:
        encoded, tokens = encode_dataset(
            dataset, tokenizer, max_length=limit, overflow=overflow, on_bad_row=source.on_bad_row,
            needs_reference=needs_reference,
        )  # fmt: skip
    except UserError as error:
        place = f"{source.title}: {error.where}" if error.where else source.title
        raise UserError(error.what, where=place, fix=error.fix) from error
    return encoded, {**read.as_dict(), "tokens": tokens.as_dict()}


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
    import datasets

    records, report = read_ranked(source, prompt, pairs=False)
    best: list[Any] = [record["completions"][0] for record in records]
    text = part = datasets.Value("string")
    if isinstance(records[0]["prompt"], list):
        best, part = [[{"role": "assistant", "content": response}] for response in best], _messages()
    table = {name: [record[name] for record in records] for name in ("id", "prompt")}
    features = datasets.Features({"id": text, "prompt": part, "completion": part})
    return datasets.Dataset.from_dict({**table, "completion": best}, features=features), report


def load_prompts(source: DataSource, prompt: PromptConfig) -> tuple[list[Record], ReadReport]:
    """Reads only the prompts, from any format; the records need no responses.

    Returns:
        A list of `{"id", "prompt", "reference", "record"}` (`reference` is the response that came with the prompt, or
        None; `record` is the raw one), and the counts.

    Raises:
        UserError: See `load_ranked`.
    """
    return _read_unranked(source, prompt, "Reading prompts", _prompt_alone)


def load_candidates(source: DataSource, prompt: PromptConfig) -> tuple[list[Record], ReadReport]:
    """Reads responses that are to be scored or judged, from any format; existing ranks and scores are ignored.

    Returns:
        A list of `{"id", "prompt", "completions", "reference", "record"}`, the completions in the order of the file
        with exact duplicates merged, and the counts. `record` is the record that the prompt came from: the raw one, or
        its `record` key, which files of samples have.

    Raises:
        UserError: See `load_ranked`, but one response is enough.
    """
    return _read_unranked(source, prompt, "Reading responses", _with_responses)


def read_ranked(source: DataSource, prompt: PromptConfig, *, pairs: bool = True) -> tuple[list[Record], ReadReport]:
    """The records of `load_ranked` as a list; `pairs=False` also accepts records with one response or all tied."""
    first: list[Prompt] = []  # the first prompt, once there is one

    def build(raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate) -> Normalised:
        normalised = _read_one(raw, where, format, source, template, pairs)
        prompt = normalised.record["prompt"]
        if first and isinstance(prompt, str) != isinstance(first[0], str):
            what = "the prompt is text in some records and messages in others"
            raise BadRow(what, reason="wrong type", where=where)
        first[:] = [prompt]
        return normalised

    return _read(source, prompt, "Reading responses", build)


def source_format(source: DataSource) -> tuple[str, DataSource]:
    """The name of the source's format, detected from its first record where it is `auto`, and what it reads it as.

    Returns:
        The name, and the source with the `format` or the `columns` that say the same without looking at the data.
    """
    format, read_as = _format(source, read_records(source.model_copy(update={"limit": 1})))
    name = "columns" if read_as.columns is not None else format.name
    return format.name, read_as.model_copy(update={"format": name})


def best_alone(record: Record) -> Record:
    """A normalised record with only its best response, as supervised stages use it."""
    scores = record["scores"]
    return {
        **record,
        "completions": record["completions"][:1],
        "scores": scores and scores[:1],
        "ranks": [0],
        "reference": None,
    }


def ranked_dataset(records: list[Record]) -> datasets.Dataset:
    """Normalised records as a data set, with the same column types whatever the records hold."""
    import datasets

    text = datasets.Value("string")
    features = {
        "id": text,
        "prompt": text if isinstance(records[0]["prompt"], str) else _messages(),
        "completions": datasets.List(text),
        "scores": datasets.List(datasets.Value("float64")),
        "ranks": datasets.List(datasets.Value("int64")),
        "reference": text,
    }
    table = {name: [record[name] for record in records] for name in features}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def _read(
    source: DataSource,
    prompt: PromptConfig,
    what: str,
    build: Callable[[Record, str, Format, DataSource, PromptTemplate], Normalised],
    *,
    prompts_only: bool = False,
) -> tuple[list[Record], ReadReport]:
    """What `build` makes of each raw record, with invalid ones skipped and counted where the source allows it."""
    raw_records = read_records(source)
    (format, source), template = _format(source, raw_records, prompts_only=prompts_only), PromptTemplate(prompt)
    if source.group_by is not None:
        raw_records, format = group_rows(raw_records, source.group_by), grouped(format)
    records, report = [], ReadReport()
    # The bar is shown only on a terminal, and only after two seconds.
    for where, raw in tqdm(raw_records, desc=what, unit=" records", delay=2, disable=None, leave=False):
        report.read += 1
        try:
            built = build(raw, where, format, source, template)
        except BadRow as error:
            if source.on_bad_row == "error":
                raise
            report.skipped[error.reason] = report.skipped.get(error.reason, 0) + 1
            continue
        report.duplicates_merged += built.merged
        report.omitted += built.omitted
        report.contradictions += built.contradictions
        report.comparisons += built.comparisons
        if built.contradictions and report.first_contradiction is None:
            report.first_contradiction = where
        report.responses += len(built.record.get("completions", ())) + built.merged + built.omitted
        records.append(built.record)
    report.kept = len(records)
    if not records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.skipped.items())
        raise UserError(
            f"none of the {report.read} records can be used ({reasons})",
            where=source.title,
            fix="Check `format` and `columns`; with `on_bad_row: error` the message names the first invalid record.",
        )
    return records, report


def _read_unranked(
    source: DataSource,
    prompt: PromptConfig,
    what: str,
    read: Callable[[Record, str, Format, DataSource, Prompt], tuple[Record, int]],
) -> tuple[list[Record], ReadReport]:
    def build(raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate) -> Normalised:
        identity, text = format.prompt(raw, source, template, where)
        row = {"id": record_id(identity, where), "prompt": clean_prompt(text, where)}
        rest, merged = read(raw, where, format, source, row["prompt"])
        return Normalised({**row, **rest}, merged, omitted=0)

    return _read(source, prompt, what, build, prompts_only=True)


def _prompt_alone(raw: Record, where: str, format: Format, source: DataSource, prompt: Prompt) -> tuple[Record, int]:
    try:
        found = format.responses(raw, source, where)
    except BadRow:  # responses are optional here
        found = {"reference": None}
    reference = found["completions"][0] if format.name == "alpaca" and "completions" in found else found["reference"]
    if not isinstance(reference, str) or not reference.strip():
        reference = None
    return {"reference": reference, "record": raw}, 0


def _with_responses(raw: Record, where: str, format: Format, source: DataSource, prompt: Prompt) -> tuple[Record, int]:
    found = format.responses(raw, source, where)
    responses = found["completions"]
    if not isinstance(responses, list) or not responses:
        raise BadRow("the record has no responses", reason="no responses", where=where)
    texts = [
        clean_response(response, prompt, f"{where}, candidate {index}") for index, response in enumerate(responses)
    ]
    distinct = list(dict.fromkeys(texts))
    reference = found["reference"]
    rest = {
        "completions": distinct,
        "reference": None if reference is None else clean_response(reference, prompt, f"{where}, reference"),
        "record": raw.get("record", raw),
    }
    return rest, len(texts) - len(distinct)


def _read_one(
    raw: Record, where: str, format: Format, source: DataSource, template: PromptTemplate, pairs: bool
) -> Normalised:
    identity, prompt = format.prompt(raw, source, template, where)
    found = format.responses(raw, source, where)
    # The reference can make the only pair, so pairs are required after it is added.
    built = normalise({"id": identity, "prompt": prompt, **found}, where, pairs=pairs and not source.add_reference)
    built.merged += found.get("merged", 0)
    built.contradictions, built.comparisons = found.get("contradictions", 0), found.get("comparisons", 0)
    if source.add_reference is not None:
        second = normalise(add_reference(built.record, source.add_reference, where), where, pairs=pairs)
        built.record, built.merged = second.record, built.merged + second.merged
    return built


def _format(source: DataSource, raw_records: RawRecords, *, prompts_only: bool = False) -> tuple[Format, DataSource]:
    where, first = raw_records[0]
    return choose_format(source, first, where, prompts_only=prompts_only)


def _messages() -> Any:
    import datasets

    return datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
