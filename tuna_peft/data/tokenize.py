"""Joint tokenization: prompt and response are tokenized as one text and split where the tokens of the prompt end.

Tokenizing them separately gives sequences that the model never sees in use ("_Hello" becomes "_" and "Hello"). With
joint tokenization the last tokens of the prompt can depend on the response. `prompt_ids` is therefore the longest
prefix that the tokens of the prompt and of all prompt + response texts share. A response whose own boundary is later
starts with the rest of the prompt, which carries no loss (`completion_skips` tokens).
"""

from __future__ import annotations

import dataclasses
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from tuna_peft.data.config import Overflow
from tuna_peft.data.ranked import BadRow, Record, clean_prompt, clean_response, dense_ranks, normalise_ranked
from tuna_peft.data.readers import preference_responses
from tuna_peft.data.texts import TextTokenizer, joint_texts
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # rows per call of the tokenizer: enough for its threads, little memory


@dataclasses.dataclass
class TokenReport:
    """Counts of a tokenized data set.

    Args:
        rows: Number of input rows.
        kept: Number of rows kept.
        responses: Responses of the input rows, including reference responses.
        responses_cut: Responses truncated to `max_length`, including reference responses.
        responses_dropped: Responses skipped because they are too long, including reference responses.
        prompt_tokens: Number of prompt tokens, each prompt counted once.
        response_tokens: Number of tokens that carry loss, without reference responses.
        longest: Length of the longest prompt with one response, in tokens.
    """

    rows: int = 0
    kept: int = 0
    responses: int = 0
    responses_cut: int = 0
    responses_dropped: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts as plain JSON values, with the number of skipped rows."""
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
    """Tokenizes one normalised record.

    Args:
        record: A record of the ranked type, see `normalise_ranked`.
        tokenizer: It must have an EOS token, which ends every response.
        max_length: Maximum length of the prompt with one response in tokens, including EOS; None: no limit.
        overflow: What to do with longer ones: `error`; `cut` truncates the response, including its EOS; `skip` skips
            the response, and the row if no pair is left or the prompt is too long by itself.
        needs_reference: A record without a reference response is an error (for the SFT loss term on the reference),
            and a row is skipped if its reference is.
        where: The row's place, for errors.
        report: The counts to add to.

    Returns:
        None for a skipped row, otherwise `id`; `prompt_ids`; `completions_ids`, N lists; `completion_skips`, for each
        the number of leading tokens that carry no loss; `ranks`; `scores`; `reference_ids` and `reference_skip`, None
        without a reference. `prompt_ids + completions_ids[k]` is the joint tokenization of response k.

    Raises:
        UserError: A response or a prompt is too long, or `cut` would truncate a response to nothing; the message names
            row and candidate.
    """
    encoder = _Encoder(tokenizer, max_length, overflow, needs_reference, report or TokenReport())
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
    """Tokenizes one record of TRL's prompt-completion type; for arguments and errors see `encode_ranked`.

    Returns:
        None for a skipped row, otherwise `id`; `input_ids`; `completion_mask`, 1 on the response and its EOS; and
        `labels`, -100 on the prompt. TRL's `SFTTrainer` uses `labels` unchanged; for tokenized data it applies the
        mask only with `completion_only_loss=True`, which is not its default.
    """
    encoder = _Encoder(tokenizer, max_length, overflow, False, report or TokenReport())
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
    """Tokenizes a whole data set; deterministic.

    Args:
        dataset: The ranked type (checked and normalised here), TRL's preference type, or TRL's prompt-completion type.
        tokenizer: See `encode_ranked`.
        max_length, overflow, needs_reference: See `encode_ranked`.
        on_bad_row: `skip` skips a row that would be an error, and counts it.

    Returns:
        A data set with the rows of `encode_ranked` or `encode_sft`, and the counts.

    Raises:
        UserError: A row is invalid, or none is left.
    """
    import datasets

    columns = set(dataset.column_names)
    sft = {"prompt", "completion"} <= columns
    if not sft and not ({"prompt", "completions"} <= columns or {"prompt", "chosen", "rejected"} <= columns):
        raise UserError(
            f"the data set has the columns {', '.join(dataset.column_names)}",
            fix="Expected are prompt, completions and scores or ranks (ranked); prompt, chosen and rejected "
            "(preference); or prompt and completion (supervised).",
        )
    report = TokenReport()
    encoder = _Encoder(tokenizer, max_length, overflow, needs_reference, report, on_bad_row)
    encoded: list[dict[str, Any]] = []
    as_ranked = _sft_as_ranked if sft else _as_ranked
    rows = enumerate(tqdm(dataset, desc="Tokenizing", unit=" rows", delay=2, disable=None, leave=False))
    while chunk := list(islice(rows, _CHUNK)):
        places = [f"row {index}" + (f" (id {row['id']})" if row.get("id") else "") for index, row in chunk]
        records = [as_ranked(row, where) for (_, row), where in zip(chunk, places, strict=True)]
        encoded += [_as_sft(row) if sft else row for row in encoder.encode(records, places) if row is not None]
    if not encoded:
        raise UserError(
            f"none of the {report.rows} rows fits into max_length {max_length}",
            fix="Raise max_length, or shorten the data.",
        )
    features = {name: feature for name, feature in _features().items() if name in encoded[0]}
    table = {name: [row[name] for row in encoded] for name in features}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features)), report


class _Encoder:
    """Encodes records with the same options; for the arguments see `encode_ranked`."""

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
        """One row or None for each record; all texts are tokenized in one call."""
        texts: list[list[str]] = []
        for record, where in zip(records, places, strict=True):
            responses = [*record["completions"], *filter(None, [record["reference"]])]
            texts.append(joint_texts(record["prompt"], responses, self.tokenizer, where))
        special = isinstance(records[0]["prompt"], str)  # the prompts of a data set are all text or all messages
        ids = iter(self.tokens(list(chain.from_iterable(texts)), special=special))
        rows: list[dict[str, Any] | None] = []
        for record, of_record, where in zip(records, texts, places, strict=True):
            try:
                rows.append(self._assemble(record, list(islice(ids, len(of_record))), where))
            except BadRow:
                if self.on_bad_row == "error":
                    raise
                rows.append(None)
        return rows

    def _assemble(self, record: Record, ids: list[list[int]], where: str) -> dict[str, Any] | None:
        """The row from the tokens of the prompt, of the prompt with each response, and with the reference."""
        self.report.rows += 1
        self.report.responses += len(ids) - 1
        if record["reference"] is None and self.needs_reference:
            raise BadRow("there is no reference response", reason="no reference", where=where)
        n, eos = len(record["completions"]), self.tokens.eos
        prompt, joint = ids[0], [seq if seq[-1:] == [eos] else [*seq, eos] for seq in ids[1:]]
        names = [f"{where}, candidate {k} (in rank order)" for k in range(n)] + [f"{where}, reference"]
        shared = [_common_prefix(prompt, seq) for seq in joint]
        if min(shared) == 0:
            raise BadRow(
                "no token of the prompt stands before its responses, so nothing predicts their first token",
                reason="no prompt",
                where=where,
                fix="Lengthen the prompt, or use a tokenizer that adds BOS.",
            )
        for seq, boundary, name in zip(joint, shared, names, strict=False):
            if boundary == len(seq):  # a chat template or the tokenizer dropped the whole response
                raise BadRow("the response has no tokens", reason="empty response", where=name)
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

    def _prompt_fits(self, prompt: list[int], where: str) -> bool:
        if self.max_length is None or len(prompt) < self.max_length:
            return True
        if self.overflow == "skip":
            return False
        lost = "would be truncated to nothing" if self.overflow == "cut" else "does not fit"
        raise BadRow(
            f"the prompt has {len(prompt)} tokens and max_length is {self.max_length}: candidate 0 {lost}",
            reason="prompt too long",
            where=where,
            fix=f"Raise max_length above {len(prompt)}, shorten the prompt, or skip such rows: overflow policy "
            "`skip`, or `on_bad_row: skip` for its data.",
        )

    def _fit(self, seq: list[int], boundary: int, where: str) -> list[int] | None:
        """The joint sequence within `max_length`, or None where it is skipped."""
        if self.max_length is None or len(seq) <= self.max_length:
            return seq
        if self.overflow == "skip":
            self.report.responses_dropped += 1
            return None
        # The prompt is shorter than max_length, and no boundary is after its end: at least one token is left.
        if self.overflow == "cut":
            self.report.responses_cut += 1
            return seq[: self.max_length]
        raise BadRow(
            f"too long: prompt {boundary} + response {len(seq) - boundary} tokens, max_length is {self.max_length}",
            reason="response too long",
            where=where,
            fix=f"Raise max_length to {len(seq)}, or set the overflow policy to `cut` (truncate the response) "
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
