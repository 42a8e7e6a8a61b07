"""Joint tokenisation: prompt and response are one text, split where its tokens differ from those of the prompt alone.

Tokenising the two apart and joining the ids gives sequences that the model never sees in use ("_Hello" becomes "_"
and "Hello"). So every response is tokenised behind its prompt. The row keeps the longest prefix that the prompt alone
and all of its joint sequences share, once, as `prompt_ids`; a response whose own boundary comes later keeps the rest
of the prompt at its head, without loss (`completion_skips`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from tuna_peft.data.config import Overflow
from tuna_peft.data.ranked import BadRow, Record, clean_prompt, clean_response, dense_ranks, normalise_ranked
from tuna_peft.data.readers import preference_responses
from tuna_peft.data.texts import TextTokenizer, joint_texts, prompt_ids, prompt_text
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenReport", "encode_dataset", "encode_ranked", "encode_sft", "prompt_ids", "prompt_text"]

_CHUNK = 256  # rows tokenised in one call: enough for the tokenizer's threads, little memory


@dataclasses.dataclass
class TokenReport:
    """What became of the rows of a data set when they were tokenised.

    Args:
        rows: Rows given.
        kept: Rows kept.
        responses_cut: Responses cut to `max_length` (reference responses among them).
        responses_dropped: Responses left out as too long (reference responses among them).
        prompt_tokens: Tokens of the prompts, each counted once.
        response_tokens: Tokens that carry loss, the reference responses apart.
        longest: Tokens of the longest prompt with one response.
    """

    rows: int = 0
    kept: int = 0
    responses_cut: int = 0
    responses_dropped: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts as plain JSON values, with the number of rows left out."""
        return {**dataclasses.asdict(self), "rows_dropped": self.rows - self.kept}


def encode_ranked(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: Overflow = "error",
    needs_reference: bool = False,
    where: str = "row",
    report: TokenReport | None = None,
) -> dict[str, Any] | None:
    """Tokenises one normalised record.

    Args:
        record: Of the ranked type, see `normalise_ranked`.
        tokenizer: Has an EOS token; it ends every response.
        max_length: The most tokens of the prompt with one response, EOS included; None for no limit.
        overflow: What happens above it: `error`; `cut` cuts the end of the response (EOS with it); `skip` leaves the
            response out, and the row when it then has no pair, or its prompt alone is too long.
        needs_reference: A record without a reference response is an error (for the MLE term on the reference), and a
            row is left out with its reference.
        where: The row's place, for errors.
        report: Is added to.

    Returns:
        None for a row that is left out, else `id`; `prompt_ids`; `completions_ids`, N lists; `completion_skips`, for
        each the number of leading tokens that carry no loss; `ranks`; `scores`; `reference_ids` and `reference_skip`,
        None without a reference. `prompt_ids + completions_ids[k]` is the joint tokenisation of response k.

    Raises:
        UserError: A response or a prompt is too long, or `cut` leaves nothing of a response; names row and candidate.
    """
    encoder = _Encoder(tokenizer, max_length, overflow, needs_reference, TokenReport() if report is None else report)
    return encoder.encode([record], [where])[0]


def encode_sft(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: Overflow = "error",
    where: str = "row",
    report: TokenReport | None = None,
) -> dict[str, Any] | None:
    """Tokenises one record of TRL's prompt-completion type; arguments and errors as `encode_ranked`.

    Returns:
        None for a row that is left out, else `id`; `input_ids`; `completion_mask`, 1 on the response and its EOS; and
        `labels`, the same in the form that TRL's `SFTTrainer` takes as it is (it heeds the mask of tokenised data
        only with `completion_only_loss=True`, which is not its default there).
    """
    encoder = _Encoder(tokenizer, max_length, overflow, False, TokenReport() if report is None else report)
    row = encoder.encode([_sft_as_ranked(record, where)], [where])[0]
    return None if row is None else _as_sft(row)


def encode_dataset(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: Overflow = "error",
    needs_reference: bool = False,
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[datasets.Dataset, TokenReport]:
    """Tokenises a whole data set; equal input gives equal output.

    Args:
        dataset: The ranked type (checked and normalised here, so a user's own will do), TRL's preference type, or
            TRL's prompt-completion type.
        tokenizer: As in `encode_ranked`, like the arguments that follow.
        max_length: See there.
        overflow: See there.
        needs_reference: See there.
        on_bad_row: `skip` leaves out a row that would be an error, and counts it among the dropped ones.

    Returns:
        A data set with the rows of `encode_ranked` or `encode_sft`, and the counts.

    Raises:
        UserError: A row cannot be used, or none is left.
    """
    import datasets

    columns = set(dataset.column_names)
    sft = {"prompt", "completion"} <= columns
    if not sft and not ({"prompt", "completions"} <= columns or {"prompt", "chosen", "rejected"} <= columns):
        raise UserError(
            f"the data set has the columns {', '.join(dataset.column_names)}",
            fix="Wanted are prompt, completions and scores or ranks (ranked); prompt, chosen and rejected "
            "(preference); or prompt and completion (supervised).",
        )
    report = TokenReport()
    encoder = _Encoder(tokenizer, max_length, overflow, needs_reference, report, on_bad_row)
    encoded: list[dict[str, Any]] = []
    progress = tqdm(total=len(dataset), desc="Tokenising", unit=" rows", delay=2, disable=None, leave=False)
    for chunk in _chunks(enumerate(dataset)):
        places = [f"row {index}" + (f" (id {row['id']})" if row.get("id") else "") for index, row in chunk]
        as_ranked = _sft_as_ranked if sft else _as_ranked
        records = [as_ranked(row, where) for (_, row), where in zip(chunk, places, strict=True)]
        rows = encoder.encode(records, places)
        encoded += [_as_sft(row) if sft else row for row in rows if row is not None]
        progress.update(len(chunk))
    progress.close()
    if not encoded:
        raise UserError(
            f"none of the {report.rows} rows fits into max_length {max_length}",
            fix="Raise max_length, or shorten the data.",
        )
    features = {name: feature for name, feature in _features().items() if name in encoded[0]}
    table = {name: [row[name] for row in encoded] for name in features}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features)), report


class _Encoder:
    """Encodes records with one set of options; for the arguments see `encode_ranked`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        overflow: Overflow,
        needs_reference: bool,
        report: TokenReport,
        on_bad_row: Literal["error", "skip"] = "error",
    ):
        self.tokenizer, self.tokens = tokenizer, TextTokenizer(tokenizer)
        self.max_length, self.overflow = max_length, overflow
        self.needs_reference, self.report = needs_reference, report
        self.on_bad_row = on_bad_row

    def encode(self, records: list[Record], places: list[str]) -> list[dict[str, Any] | None]:
        """One row or None for each record; all texts go through the tokenizer in one call."""
        texts: list[list[str]] = []
        for record, where in zip(records, places, strict=True):
            reference = record["reference"]
            responses = [*record["completions"], *([] if reference is None else [reference])]
            texts.append(joint_texts(record["prompt"], responses, self.tokenizer, where))
        special = isinstance(records[0]["prompt"], str)  # prompts of one data set are of one kind
        ids = iter(self.tokens(list(chain.from_iterable(texts)), special=special))
        return [
            self._row(record, list(islice(ids, len(of_record))), where)
            for record, of_record, where in zip(records, texts, places, strict=True)
        ]

    def _row(self, record: Record, ids: list[list[int]], where: str) -> dict[str, Any] | None:
        try:
            return self._assemble(record, ids, where)
        except BadRow:
            if self.on_bad_row == "error":
                raise
            return None

    def _assemble(self, record: Record, ids: list[list[int]], where: str) -> dict[str, Any] | None:
        """The row from the tokens of the prompt alone, of the prompt with each response, and with the reference."""
        self.report.rows += 1
        if record["reference"] is None and self.needs_reference:
            raise BadRow("there is no reference response", reason="no reference", where=where)
        n, eos = len(record["completions"]), self.tokens.eos
        prompt, joint = ids[0], [seq if seq[-1:] == [eos] else [*seq, eos] for seq in ids[1:]]
        names = [f"{where}, candidate {k} (in rank order)" for k in range(n)] + [f"{where}, reference"]
        shared = [_common_prefix(prompt, seq) for seq in joint]
        self._check_boundaries(joint, shared, where, names)
        if not self._prompt_fits(prompt, where):
            return None
        start = min(shared)
        fitted: list[list[int] | None] = [
            self._fit(seq, boundary, name) for seq, boundary, name in zip(joint, shared, names, strict=False)
        ]
        kept = [(k, seq[start:]) for k, seq in enumerate(fitted[:n]) if seq is not None]
        ranks = dense_ranks([record["ranks"][k] for k, _ in kept])
        if len(kept) < n and len(set(ranks)) < 2:
            return None
        reference = fitted[n] if len(fitted) > n else None
        if reference is None and self.needs_reference:
            return None
        skips = [shared[k] - start for k, _ in kept]
        self.report.kept += 1
        self.report.prompt_tokens += start
        self.report.response_tokens += sum(len(seq) for _, seq in kept) - sum(skips)
        self.report.longest = max(self.report.longest, *(start + len(seq) for _, seq in kept))
        return {
            "id": record["id"],
            "prompt_ids": prompt[:start],
            "completions_ids": [seq for _, seq in kept],
            "completion_skips": skips,
            "ranks": ranks,
            "scores": record["scores"] and [record["scores"][k] for k, _ in kept],
            "reference_ids": None if reference is None else reference[start:],
            "reference_skip": None if reference is None else shared[n] - start,
        }

    def _check_boundaries(self, joint: list[list[int]], shared: list[int], where: str, names: list[str]) -> None:
        if min(shared) == 0:
            raise BadRow(
                "no token of the prompt stands before its responses, so nothing predicts their first token",
                reason="no prompt",
                where=where,
                fix="Lengthen the prompt, or use a tokenizer that adds BOS.",
            )
        for seq, boundary, name in zip(joint, shared, names, strict=False):
            if boundary == len(seq):  # only where a template or the tokenizer drops all of the response
                raise BadRow("the response has no tokens", reason="empty response", where=name)

    def _prompt_fits(self, prompt: list[int], where: str) -> bool:
        if self.max_length is None or len(prompt) < self.max_length:
            return True
        if self.overflow == "skip":
            return False
        lost = "would be cut to nothing" if self.overflow == "cut" else "has no room"
        raise BadRow(
            f"the prompt has {len(prompt)} tokens and max_length is {self.max_length}: candidate 0 {lost}",
            reason="prompt too long",
            where=where,
            fix=f"Raise max_length above {len(prompt)}, shorten the prompt, or leave such rows out: overflow policy "
            "`skip`, or `on_bad_row: skip` for its data.",
        )

    def _fit(self, seq: list[int], boundary: int, where: str) -> list[int] | None:
        """The joint sequence within `max_length`, or None where it is left out."""
        if self.max_length is None or len(seq) <= self.max_length:
            return seq
        if self.overflow == "skip":
            self.report.responses_dropped += 1
            return None
        # A prompt that fits leaves at least one token of every response, as no boundary lies behind its end.
        if self.overflow == "cut":
            self.report.responses_cut += 1
            return seq[: self.max_length]
        raise BadRow(
            f"too long: prompt {boundary} + response {len(seq) - boundary} tokens, max_length is {self.max_length}",
            reason="response too long",
            where=where,
            fix=f"Raise max_length to {len(seq)}, or set the overflow policy to `cut` (the end of the response) "
            "or `skip`.",
        )


def _as_ranked(row: Record, where: str) -> Record:
    if "completions" not in row:
        row = {**row, **preference_responses(row, None, where)}
    return normalise_ranked(row, where)


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
    response, skip = row["completions_ids"][0], row["completion_skips"][0]
    input_ids = row["prompt_ids"] + response
    prompt_length = len(row["prompt_ids"]) + skip
    return {
        "id": row["id"],
        "input_ids": input_ids,
        "completion_mask": [0] * prompt_length + [1] * (len(response) - skip),
        "labels": [-100] * prompt_length + response[skip:],
    }


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _features() -> dict[str, Any]:
    import datasets

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    return {
        "id": datasets.Value("string"),
        "prompt_ids": ids,
        "completions_ids": datasets.List(ids),
        "completion_skips": ids,
        "ranks": ids,
        "scores": datasets.List(datasets.Value("float64")),
        "reference_ids": ids,
        "reference_skip": number,
        "input_ids": ids,
        "completion_mask": datasets.List(datasets.Value("int8")),
        "labels": ids,
    }
