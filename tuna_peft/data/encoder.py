"""The tokens of records with the same options: borders, truncation, merging and counting. Used by `tokenize`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import Overflow, PromptConfig
from tuna_peft.data.ranked import Record, dense_ranks
from tuna_peft.data.rendering import Joint, Renderer
from tuna_peft.data.texts import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


@dataclasses.dataclass
class Options:
    """See `tuna_peft.data.tokenize.encode_ranked`."""

    max_length: int | None
    overflow: Overflow
    needs_reference: bool
    prompt: PromptConfig
    merge: bool = True


class Encoder:
    """Encodes records with the same options."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Options,
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

    def finish(self, *, log: bool = True) -> None:
        """Counts what chat templates did to the texts in the report, and logs it.

        Raises:
            BadRow: They refused or changed some, and such rows are errors; the first one, and how many there are.
        """
        for kind, (count, first) in self.renderer.changes.items():
            self.report.changes[kind] = self.report.changes.get(kind, 0) + count
            if log:
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
