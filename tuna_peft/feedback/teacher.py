"""Probabilistic ranking with a teacher on this machine: its log-probabilities of given responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.collate import RankedCollator
from tuna_peft.data.ranked import Record
from tuna_peft.feedback.local_model import load_local_model
from tuna_peft.feedback.scored import Scored, ScoreReport, encode_in_order, scored_records
from tuna_peft.feedback.settings import ScoreSettings
from tuna_peft.journal import Journal, content_key
from tuna_peft.models.forward.scoring import stream_logps
from tuna_peft.models.forward.verify import verify_packing
from tuna_peft.models.generation.generate import context_of
from tuna_peft.models.stack.any_model import model_digest
from tuna_peft.progress import Progress


def score_with_model(
    rows: Sequence[Record], settings: ScoreSettings, journal: Journal, *, device: str = "auto"
) -> tuple[list[Record], ScoreReport]:
    """Loads the teacher that the settings name and ranks with it, see `score_rows`.

    Raises:
        UserError: The teacher cannot be loaded; or see `score_rows`.
    """
    loaded = load_local_model(settings, device)
    return score_rows(loaded.model, loaded.tokenizer, rows, settings, journal)


def score_rows(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Record],
    settings: ScoreSettings,
    journal: Journal,
) -> tuple[list[Record], ScoreReport]:
    """Ranks the completions of each row by their length-normalised log-probabilities under `model`.

    A prompt and its responses are packed into one sequence, in which the prompt is computed once, as in training. EOS
    is part of a response.

    Args:
        model: Any causal LM, with or without adapters.
        tokenizer: Its tokenizer; prompts that are messages go through its chat template.
        rows: `{"id", "prompt", "completions"}`, optional `reference`, see `tuna_peft.data.load.load_candidates`.
        settings: Gives the length penalty and the maximum tokens of a batch.
        journal: Saves the sums and lengths of every row; what it has is not computed again.

    Raises:
        UserError: No row can be ranked, or a row does not fit into memory.
    """
    model.eval()
    digest, report = model_digest(model), ScoreReport()
    keys = [
        content_key(
            what="score", model=digest, prompt=row["prompt"], completions=row["completions"],
            **({"tools": row["tools"]} if row.get("tools") else {}),
        )
        for row in rows
    ]  # fmt: skip
    report.found = sum(key in journal for key in keys)
    encoded: dict[str, dict[str, Any]] = {}
    unusable: dict[str, str] = {}
    for key, row in zip(keys, rows, strict=True):
        if key not in journal and key not in encoded and key not in unusable:
            try:
                encoded[key] = encode_in_order(row, tokenizer, context_of(model), report)
            except BadRow as error:
                unusable[key] = error.reason
    report.asked = len(encoded)
    _score(model, tokenizer, encoded, settings.tokens_at_once, journal)
    answers: list[Scored | None] = []
    for key, row in zip(keys, rows, strict=True):
        if key in journal:
            answers.append(Scored(row["completions"], **journal[key]))
        else:
            report.count_skipped(unusable[key])
            answers.append(None)
    name = {key: digest["base"][key] for key in ("model", "revision")}
    name |= {"quantization": digest["quantization"], "adapters": list(digest["adapters"])}
    return scored_records(rows, answers, settings.length_penalty, name, report), report


def _score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, dict[str, Any]],
    max_tokens: int,
    journal: Journal,
) -> None:
    """Puts the sums and lengths of every row into the journal; the longest rows are computed first."""
    if encoded:
        shortest = min(encoded.values(), key=_tokens)
        verify_packing(model, shortest, next(model.parameters()).device)
    collate = RankedCollator(tokenizer.pad_token_id or 0)
    with Progress("scoring", len(encoded), "prompts") as progress:
        for keys, found in stream_logps(model, collate, encoded, _batches(encoded, max_tokens)):
            for key, sums, lengths in zip(keys, found.sums_BN.tolist(), found.lengths_BN.tolist(), strict=True):
                n = len(encoded[key]["completions_ids"])
                journal.add(key, {"logprobs": sums[:n], "lengths": lengths[:n]})
            progress.update(len(keys))


def _batches(encoded: dict[str, dict[str, Any]], max_tokens: int) -> list[list[str]]:
    """Keys in batches of at most `max_tokens` tokens, padding included; rows of similar length share a batch."""
    batches: list[list[str]] = []
    width = 0
    for key in sorted(encoded, key=lambda key: -_tokens(encoded[key])):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = _tokens(encoded[key])
        batches[-1].append(key)
    return batches


def _tokens(row: dict[str, Any]) -> int:
    """Number of tokens of a prompt and its responses; prefixes that responses share count for each."""
    return len(row["prompt_ids"]) + sum(map(len, row["completions_ids"]))
