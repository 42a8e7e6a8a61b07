"""Joint tokenization: prompt and response are tokenized as one text and split where the tokens of the prompt end.

Tokenizing them separately gives sequences that the model never sees in use ("_Hello" becomes "_" and "Hello"). With
joint tokenization the last tokens of the prompt can depend on the response. `prompt_ids` is therefore the longest
prefix that the tokens of the prompt and of all prompt + response texts share. A response whose own boundary is later
starts with the rest of the prompt, which carries no loss (`completion_skips` tokens). In a response of several turns
the turns that are not the assistant's carry none either (`completion_gaps`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import Overflow, PromptConfig
from tuna_peft.data.ranked import Record, clean_prompt, clean_response, dense_ranks, normalise_ranked
from tuna_peft.data.readers import preference_responses
from tuna_peft.data.rendering import Joint, Renderer
from tuna_peft.data.texts import TextTokenizer
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_CHUNK = 256  # rows per call of the tokenizer: enough for its threads, little memory


@dataclasses.dataclass
class TokenReport:
    """Counts of a tokenized data set.

    Args:
        rows: Number of input rows.
        responses: Number of their responses, including reference responses.
        kept: Number of rows kept.
        responses_cut: Responses truncated to `max_length`, including reference responses.
        responses_dropped: Responses skipped because they are too long, including reference responses.
        responses_merged: Responses whose tokens equal those of a better one, although their texts differ.
        prompt_tokens: Number of prompt tokens, each prompt counted once.
        response_tokens: Number of tokens that carry loss, without reference responses.
        longest: Length of the longest prompt with one response, in tokens.
        skipped: Number of rows skipped as invalid, by reason.
        changes: Number of texts that the chat template changed and that are used all the same, by kind.
    """

    rows: int = 0
    responses: int = 0
    kept: int = 0
    responses_cut: int = 0
    responses_dropped: int = 0
    responses_merged: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    changes: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values, with the number of skipped rows."""
        return {**dataclasses.asdict(self), "rows_dropped": self.rows - self.kept}


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
        record: A record of the ranked type, see `normalise_ranked`.
        tokenizer: It must have an EOS token, which ends every response.
        max_length: Maximum length of the prompt with one response in tokens, including EOS; None: no limit.
        overflow: What to do with longer ones: `error`; `cut` truncates the response, including its EOS; `skip` skips
            the response, and the row if no pair is left or the prompt is too long by itself.
        needs_reference: A record without a reference response is an error (for the SFT loss term on the reference),
            and a row is skipped if its reference is.
        prompt: `rendering` and `reasoning_loss` are used; None: their defaults.
        merge: Merge responses with equal tokens, like equal texts.
        where: The row's place, for errors.
        report: The counts to add to.

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
    options = _Options(max_length, overflow, needs_reference, prompt or PromptConfig(), merge)
    encoder = _Encoder(tokenizer, options, report or TokenReport())
    [row] = encoder.encode([record], [where])
    encoder.finish()
    return row


def encode_sft(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overflow: Overflow = "error",
    prompt: PromptConfig | None = None,
    where: str = "row",
    report: TokenReport | None = None,
) -> dict[str, Any] | None:
    """Tokenizes one record of TRL's prompt-completion type; for arguments and errors see `encode_ranked`.

    Returns:
        None for a skipped row, otherwise `id`; `input_ids`; `completion_mask`, 1 on the response and its EOS; and
        `labels`, -100 on the prompt. TRL's `SFTTrainer` uses `labels` unchanged; for tokenized data it applies the
        mask only with `completion_only_loss=True`, which is not its default.
    """
    ranked = _sft_as_ranked(record, where)
    row = encode_ranked(
        ranked, tokenizer, max_length=max_length, overflow=overflow, prompt=prompt, where=where, report=report
    )
    return None if row is None else _as_sft(row)


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
        A data set with the rows of `encode_ranked` or `encode_sft`, and the counts.

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
    total: int,
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
        total: Their number.
        sft: Return rows of `encode_sft`.
    """
    import datasets

    report = TokenReport()
    options = _Options(max_length, overflow, needs_reference, prompt or PromptConfig())
    encoder = _Encoder(tokenizer, options, report, on_bad_row)
    encoded: list[dict[str, Any]] = []
    progress = tqdm(records, total=total, desc="Tokenizing", unit=" rows", delay=2, disable=None, leave=False)
    remaining = iter(progress)
    while chunk := list(islice(remaining, _CHUNK)):
        rows = encoder.encode([record for _, record in chunk], [where for where, _ in chunk])
        encoded += [_as_sft(row) if sft else row for row in rows if row is not None]
    encoder.finish()
    if not encoded:
        reasons = "".join(f", {count} skipped ({reason})" for reason, count in report.skipped.items())
        raise UserError(
            f"none of the {report.rows} rows fits into max_length {max_length}{reasons}",
            fix="Raise max_length, or shorten the data.",
        )
    present = {name for row in encoded for name in row}
    features = {name: feature for name, feature in _features().items() if name in present}
    table = {name: [row.get(name) for row in encoded] for name in features}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features)), report


@dataclasses.dataclass
class _Options:
    """See `encode_ranked`."""

    max_length: int | None
    overflow: Overflow
    needs_reference: bool
    prompt: PromptConfig
    merge: bool = True


class _Encoder:
    """Encodes records with the same options."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: _Options,
        report: TokenReport,
        on_bad_row: Literal["error", "skip"] = "error",
    ):
        self.tokens, self.options, self.report, self.on_bad_row = TextTokenizer(tokenizer), options, report, on_bad_row
        self.renderer = Renderer(tokenizer, options.prompt.rendering, options.prompt.reasoning_loss)
        self.refused: dict[str, tuple[int, BadRow]] = {}  # by reason: how many rows, and the first error

    def encode(self, records: list[Record], places: list[str]) -> list[dict[str, Any] | None]:
        """One row or None for each record; all texts are tokenized in one call."""
        self.report.rows += len(records)
        self.report.responses += sum(len(_names(record, "")) for record in records)
        rendered: list[tuple[str, list[Joint]] | None] = []
        for record, where in zip(records, places, strict=True):
            try:
                rendered.append(self.renderer.render(record, where, _names(record, where)))
            except BadRow as error:
                # What a template does to one row it often does to many, so these are counted before they are raised.
                count, first = self.refused.get(error.reason, (0, error))
                self.refused[error.reason] = count + 1, first
                rendered.append(None)
        texts = [
            text
            for start, joints in filter(None, rendered)
            for text in (
                start,
                *(joint.text for joint in joints),
                *(cut for joint in joints for cut in _cuts(start, joint)),
            )
        ]
        special = isinstance(records[0]["prompt"], str)  # the prompts of a data set are all text or all messages
        ids = iter(self.tokens(texts, special=special))
        rows: list[dict[str, Any] | None] = []
        for record, texts_of, where in zip(records, rendered, places, strict=True):
            if texts_of is None:
                rows.append(None)
                continue
            start, joints = texts_of
            prompt, *joint_ids = islice(ids, 1 + len(joints))
            cut_ids = [list(islice(ids, len(_cuts(start, joint)))) for joint in joints]
            try:
                rows.append(self._assemble(record, prompt, joint_ids, cut_ids, where))
            except BadRow as error:
                if self.on_bad_row == "error":
                    raise
                self.report.skipped[error.reason] = self.report.skipped.get(error.reason, 0) + 1
                rows.append(None)
        return rows

    def finish(self) -> None:
        """Reports what chat templates did to the texts.

        Raises:
            BadRow: They refused or changed some, and such rows are errors; the first one, and how many there are.
        """
        for kind, (count, first) in self.renderer.changes.items():
            self.report.changes[kind] = count
            logger.warning("%s: %d responses, the first in %s", kind, count, first)
        for reason, (count, error) in self.refused.items():
            if self.on_bad_row == "error":
                more = f" ({count} of {self.report.rows} rows: {reason})" if count > 1 else ""
                raise BadRow(error.what + more, reason=reason, where=error.where, fix=error.fix or "") from error
            self.report.skipped[reason] = count

    def _assemble(
        self,
        record: Record,
        prompt: list[int],
        joint_ids: list[list[int]],
        cut_ids: list[list[list[int]]],
        where: str,
    ) -> dict[str, Any] | None:
        """The row from the tokens of the prompt, of the prompt with each response, and of what precedes each cut."""
        needs_reference = self.options.needs_reference
        if record["reference"] is None and needs_reference:
            raise BadRow("there is no reference response", reason="no reference", where=where)
        n, eos = len(record["completions"]), self.tokens.eos
        joint = [seq if seq[-1:] == [eos] else [*seq, eos] for seq in joint_ids]
        names = _names(record, where)
        shared = [_common_prefix(prompt, seq) for seq in joint]
        if min(shared) == 0:
            raise BadRow(
                "no token of the prompt stands before its responses, so nothing predicts their first token",
                reason="no prompt",
                where=where,
                fix="Lengthen the prompt, or use a tokenizer that adds BOS.",
            )
        parts = [
            # The first token with loss, then the borders of later parts without loss. An odd number of cuts includes
            # the first border, which is elsewhere the end of the prompt.
            [*([boundary] if len(cuts) % 2 == 0 else []), *(_common_prefix(before, seq) for before in cuts)]
            for seq, boundary, cuts in zip(joint, shared, cut_ids, strict=True)
        ]
        for seq, loss, name in zip(joint, parts, names, strict=True):
            if loss[0] >= len(seq):  # a chat template or the tokenizer dropped the whole response
                raise BadRow("the response has no tokens", reason="empty response", where=name)
        if not self._prompt_fits(prompt, where):
            return None
        start = min(shared)
        fitted = [self._fit(seq, loss[0], name) for seq, loss, name in zip(joint, parts, names, strict=True)]
        kept: dict[tuple[int, ...], int] = {}  # the first of equal responses has the best rank
        for k, tokens in enumerate(fitted[:n]):
            if tokens is not None:
                kept.setdefault(tuple(tokens) if self.options.merge else (k,), k)
        merged = sum(tokens is not None for tokens in fitted[:n]) - len(kept)
        ranks = dense_ranks([record["ranks"][k] for k in kept.values()])
        if len(kept) < n and len(set(ranks)) < 2:
            if merged and fitted == joint:
                what = f"all responses that differ in rank have the same tokens ({merged} of {n} are merged)"
                raise BadRow(what, reason="same tokens", where=where)
            return None
        reference = fitted[n] if len(fitted) > n else None
        if reference is None and needs_reference:
            return None
        completions = [(fitted[k] or [])[start:] for k in kept.values()]
        skips = [parts[k][0] - start for k in kept.values()]
        gaps = [[token - start for token in parts[k][1:]] for k in kept.values()]
        self.report.kept += 1
        self.report.responses_merged += merged
        self.report.prompt_tokens += start
        self.report.response_tokens += sum(
            len(loss_tokens(range(len(seq)), skip, gap))
            for seq, skip, gap in zip(completions, skips, gaps, strict=True)
        )
        self.report.longest = max(self.report.longest, *(start + len(seq) for seq in completions))
        row = {
            "id": record["id"],
            "prompt_ids": prompt[:start],
            "completions_ids": completions,
            "completion_skips": skips,
            "ranks": ranks,
            "scores": record["scores"] and [record["scores"][k] for k in kept.values()],
            "reference_ids": None if reference is None else reference[start:],
            "reference_skip": None if reference is None else parts[n][0] - start,
        }
        if any(len(loss) > 1 for loss in parts):
            row["completion_gaps"] = gaps
            row["reference_gaps"] = None if reference is None else [token - start for token in parts[n][1:]]
        return row

    def _prompt_fits(self, prompt: list[int], where: str) -> bool:
        if self.options.max_length is None or len(prompt) < self.options.max_length:
            return True
        if self.options.overflow == "skip":
            return False
        lost = "would be truncated to nothing" if self.options.overflow == "cut" else "does not fit"
        raise BadRow(
            f"the prompt has {len(prompt)} tokens and max_length is {self.options.max_length}: candidate 0 {lost}",
            reason="prompt too long",
            where=where,
            fix=f"Raise max_length above {len(prompt)}, shorten the prompt, or skip such rows: overflow policy "
            "`skip`, or `on_bad_row: skip` for its data.",
        )

    def _fit(self, seq: list[int], boundary: int, where: str) -> list[int] | None:
        """The joint sequence within `max_length`, or None where it is skipped."""
        if self.options.max_length is None or len(seq) <= self.options.max_length:
            return seq
        if self.options.overflow == "skip":
            self.report.responses_dropped += 1
            return None
        if self.options.overflow == "cut":
            if boundary >= self.options.max_length:  # only reasoning without loss would be left
                self.report.responses_dropped += 1
                return None
            self.report.responses_cut += 1
            return seq[: self.options.max_length]
        raise BadRow(
            f"too long: prompt {boundary} + response {len(seq) - boundary} tokens, "
            f"max_length is {self.options.max_length}",
            reason="response too long",
            where=where,
            fix=f"Raise max_length to {len(seq)}, or set the overflow policy to `cut` (truncate the response) "
            "or `skip`.",
        )


def _as_ranked(row: Record, where: str) -> Record:
    if "completions" not in row:
        row = {**row, **preference_responses(row, None, None, where)}
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
    prompt, response = row["prompt_ids"], row["completions_ids"][0]
    mask = [0] * (len(prompt) + len(response))
    gaps = row.get("completion_gaps", [[]])[0]
    for place in loss_tokens(range(len(prompt), len(mask)), row["completion_skips"][0], gaps):
        mask[place] = 1
    input_ids = prompt + response
    labels = [token if loss else -100 for token, loss in zip(input_ids, mask, strict=True)]
    return {"id": row["id"], "input_ids": input_ids, "completion_mask": mask, "labels": labels}


def loss_tokens(tokens: Sequence[int], skip: int, gaps: Sequence[int]) -> list[int]:
    """Those of the tokens of a response that carry loss: without the first `skip`, and without its gaps.

    Args:
        tokens: One entry for each token of the response.
        skip: See `encode_ranked`.
        gaps: An entry of `completion_gaps`.
    """
    parts = zip([skip, *gaps[1::2]], [*gaps[::2], len(tokens)], strict=True)
    return [token for begin, end in parts for token in tokens[begin:end]]


def _names(record: Record, where: str) -> list[str]:
    names = [f"{where}, candidate {k} (in rank order)" for k in range(len(record["completions"]))]
    return names if record["reference"] is None else [*names, f"{where}, reference"]


def _cuts(start: str, joint: Joint) -> list[str]:
    """The texts before each border between tokens with and without loss; the ends of prompt and text are known."""
    borders = [border for part in joint.loss for border in part][:-1]
    return [joint.text[:border] for border in (borders[1:] if borders[0] == len(start) else borders)]


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
