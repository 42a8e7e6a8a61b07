"""Joint tokenization: prompt and response are tokenized as one text and split where the tokens of the prompt end.

Tokenizing them separately gives sequences that the model never sees in use ("_Hello" becomes "_" and "Hello"). With
joint tokenization the last tokens of the prompt can depend on the response. `prompt_ids` is therefore the longest
prefix that the tokens of the prompt and of all prompt + response texts share. A response whose own boundary is later
starts with the rest of the prompt, which carries no loss (`completion_skips` tokens). In a response of several turns
the turns that are not the assistant's carry none either (`completion_gaps`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from tuna_peft.data.config import Overflow, PromptConfig
from tuna_peft.data.dialogues import preference_responses
from tuna_peft.data.encoder import Encoder, Options, TokenReport, loss_tokens
from tuna_peft.data.ranked import Record, clean_prompt, clean_response, normalise
from tuna_peft.data.rows_on_disk import write_rows
from tuna_peft.errors import UserError
from tuna_peft.progress import tracked

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # rows per call of the tokenizer: enough for its threads, little memory


def encode_ranked(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: Overflow = "error",
    needs_reference: bool = False,
    prompt: PromptConfig | None = None,
    merge: bool = True,
    where: str = "row",
    report: TokenReport | None = None,
) -> dict[str, Any] | None:
    """Tokenizes one normalised record.

    Args:
        record: A record of the ranked type, see `tuna_peft.data.ranked.normalise`.
        tokenizer: It must have an EOS token, which ends every response.
        max_length: Maximum length of the prompt with one response in tokens, including EOS; None: no limit.
        overflow: What to do with longer ones: `error`; `cut` truncates the response, including its EOS; `skip` skips
            the response, and the row if no pair is left or the prompt is too long by itself.
        needs_reference: A record without a reference response is an error (for the SFT loss term on the reference),
            and a row is skipped if its reference is.
        prompt: `rendering` and `reasoning_loss` are used; None: their defaults.
        merge: Merge responses with equal tokens, like equal texts.
        where: The row's place, for errors.
        report: The counts to add to. What the chat template did to the texts is then counted there and not logged.

    Returns:
        None for a skipped row, otherwise `id`; `prompt_ids`; `completions_ids`, N lists; `completion_skips`, for each
        the number of leading tokens that carry no loss; `ranks`; `scores`; `reference_ids` and `reference_skip`, None
        without a reference. `prompt_ids + completions_ids[k]` is the joint tokenization of response k. Where a
        response has several turns, also `completion_gaps`: for each response begin and end of each later part without
        loss, one after the other; and `reference_gaps`.

    Raises:
        UserError: A response or a prompt is too long, `cut` would truncate a response to nothing, or the chat template
            refuses or changes the texts; the message names row and candidate.
    """
    options = Options(max_length, overflow, needs_reference, prompt or PromptConfig(), merge)
    encoder = Encoder(tokenizer, options, report or TokenReport())
    [row] = encoder.encode([record], [where])
    encoder.finish(log=report is None)
    return row


def encode_dataset(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: Overflow = "error",
    needs_reference: bool = False,
    prompt: PromptConfig | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[datasets.Dataset, TokenReport]:
    """Tokenizes a whole data set; deterministic.

    Args:
        dataset: The ranked type (checked and normalised here), TRL's preference type, or TRL's prompt-completion type.
        tokenizer: See `encode_ranked`.
        max_length, overflow, needs_reference, prompt: See `encode_ranked`.
        on_bad_row: `skip` skips a row that would be an error, and counts it.

    Returns:
        A data set with the rows of `encode_ranked`, or supervised ones, and the counts. Those have `id`, `input_ids`,
        `completion_mask`, 1 on the response and its EOS, and `labels`, -100 on the prompt. TRL's `SFTTrainer` uses
        `labels` unchanged; for tokenized data it applies the mask only with `completion_only_loss=True`, which is not
        its default.

    Raises:
        UserError: A row is invalid, or none is left.
    """
    columns = set(dataset.column_names)
    sft = {"prompt", "completion"} <= columns
    if not sft and not ({"prompt", "completions"} <= columns or {"chosen", "rejected"} <= columns):
        raise UserError(
            f"the data set has the columns {', '.join(dataset.column_names)}",
            fix="Expected are prompt, completions and scores or ranks (ranked); prompt, chosen and rejected "
            "(preference); or prompt and completion (supervised).",
        )

    def records() -> Iterator[tuple[str, Record]]:
        for index, row in enumerate(dataset):
            where = f"row {index}" + (f" (id {row['id']})" if row.get("id") else "")
            yield where, (_sft_as_ranked if sft else _as_ranked)(row, where)

    return encode_records(
        records(), len(dataset), tokenizer, sft=sft, max_length=max_length, overflow=overflow,
        needs_reference=needs_reference, prompt=prompt, on_bad_row=on_bad_row,
    )  # fmt: skip


def encode_records(
    records: Iterable[tuple[str, Record]],
    total: int | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sft: bool,
    max_length: int | None,
    overflow: Overflow,
    needs_reference: bool = False,
    prompt: PromptConfig | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[datasets.Dataset, TokenReport]:
    """Like `encode_dataset`, for normalised records with their places.

    Args:
        records: Place and record; supervised ones have one response.
        total: Their number; None if they are read while they are encoded.
        sft: Return supervised rows.
    """
    report = TokenReport()
    options = Options(max_length, overflow, needs_reference, prompt or PromptConfig())
    encoder = Encoder(tokenizer, options, report, on_bad_row)
    if total is not None:  # otherwise they are read meanwhile, and that has a bar
        records = tracked(records, "tokenizing", "rows", total)

    def chunks() -> Iterator[list[dict[str, Any]]]:
        remaining = iter(records)
        while chunk := list(islice(remaining, _CHUNK)):
            rows = encoder.encode([record for _, record in chunk], [where for where, _ in chunk])
            yield [_as_sft(row) if sft else row for row in rows if row is not None]

    encoded = write_rows(chunks(), _features())
    encoder.finish()
    if not report.kept:
        reasons = "".join(f", {count} skipped ({reason})" for reason, count in report.skipped.items())
        raise UserError(
            f"none of the {report.rows} rows fits into max_length {max_length}{reasons}",
            fix="Raise max_length, or shorten the data.",
        )
    return encoded, report


def require_known_ids(encoded: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Checks that the model has a row for every token.

    Args:
        encoded: Rows of `encode_dataset`.
        vocabulary: Number of rows of the model's embedding.

    Raises:
        UserError: Names the first row with a token that the model does not have.
    """
    import pyarrow.compute

    def highest_of(column: Any) -> int:
        while pyarrow.types.is_nested(column.type):
            column = pyarrow.compute.list_flatten(column)
        return pyarrow.compute.max(column).as_py() or 0

    columns = {"input_ids", "prompt_ids", "completions_ids", "reference_ids"} & set(encoded.column_names)
    table = encoded.select_columns(sorted(columns)).with_format("arrow")[:]
    if all(highest_of(table[name]) < vocabulary for name in columns):
        return
    for index, row in enumerate(encoded):
        parts = [row["input_ids"]] if "input_ids" in row else [row["prompt_ids"], *row["completions_ids"]]
        highest = max(chain.from_iterable([*parts, row.get("reference_ids") or []]))
        if highest >= vocabulary:
            raise UserError(
                f"the token {tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, and the model has "
                f"{vocabulary:,} rows",
                where=f"row {index}" + (f" (id {row['id']})" if row.get("id") else ""),
                fix="Remove it from the data, or take the tokenizer that belongs to the model.",
            )


def require_scores(encoded: datasets.Dataset) -> None:
    """Checks that every row of `encode_dataset` has scores.

    Raises:
        UserError: One has ranks only; names the first.
    """
    column = encoded["scores"] if "scores" in encoded.column_names else [None]
    for index, scores in enumerate(column):
        if scores is None:
            raise UserError(
                f"the loss uses scores, and row {index} has only ranks",
                fix="Give scores, or use loss_type, margin_by and pair_weight that need ranks alone.",
            )


def _as_ranked(row: Record, where: str) -> Record:
    if "completions" not in row:
        row = {**row, **preference_responses(row, where)}
    return normalise(row, where).record


def _sft_as_ranked(row: Record, where: str) -> Record:
    prompt = clean_prompt(row["prompt"], where)
    completion = clean_response(row["completion"], prompt, f"{where}, candidate 0")
    return {
        "id": str(row.get("id") or where),
        "prompt": prompt,
        "completions": [completion],
        "scores": None,
        "ranks": [0],
        "reference": None,
    }


def _as_sft(row: dict[str, Any]) -> dict[str, Any]:
    prompt, response = row["prompt_ids"], row["completions_ids"][0]
    mask = [0] * (len(prompt) + len(response))
    gaps = row.get("completion_gaps", [[]])[0]
    for place in loss_tokens(range(len(prompt), len(mask)), row["completion_skips"][0], gaps):
        mask[place] = 1
    input_ids = prompt + response
    labels = [token if loss else -100 for token, loss in zip(input_ids, mask, strict=True)]
    return {"id": row["id"], "input_ids": input_ids, "completion_mask": mask, "labels": labels}


def _features() -> dict[str, Any]:
    import datasets

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    return {
        "id": datasets.Value("string"),
        "prompt_ids": ids,
        "completions_ids": datasets.List(ids),
        "completion_skips": ids,
        "completion_gaps": datasets.List(ids),
        "ranks": ids,
        "scores": datasets.List(datasets.Value("float64")),
        "reference_ids": ids,
        "reference_skip": number,
        "reference_gaps": ids,
        "input_ids": ids,
        "completion_mask": datasets.List(datasets.Value("int8")),
        "labels": ids,
    }
