"""Says on the terminal and in the log which records and responses are left out, with their share. Used by `run`."""

from __future__ import annotations

import logging
from typing import Any

from tuna_peft.data.config import DataSource

logger = logging.getLogger("tuna_peft")

# From this share on, a line is a warning and names the key that would keep what is left out.
WARN_ABOVE = 0.1

_LONGER = "raise `train.max_length`, or set `overflow: cut`"


def report_losses(source: DataSource, counts: dict[str, Any]) -> None:
    """Logs one line for each kind of loss: a warning if more than a tenth is left out.

    Args:
        source: Where the data comes from, for the lines.
        counts: `ReadReport.as_dict()`, with `TokenReport.as_dict()` under `tokens` once it is tokenized.
    """
    for text, share, keep in _losses(counts):
        line = f"{source.title}: {text} ({share:.1%})"
        if share > WARN_ABOVE:
            logger.warning("%s; to keep them, %s", line, keep)
        else:
            logger.info("%s", line)


def describe_losses(counts: dict[str, Any]) -> list[str]:
    """The same lines, for a command that prints them."""
    return [
        f"{text} ({share:.1%})" + (f"; to keep them, {keep}" if share > WARN_ABOVE else "")
        for text, share, keep in _losses(counts)
    ]


def _losses(counts: dict[str, Any]) -> list[tuple[str, float, str]]:
    """What was left out, its share of all records or responses, and what would keep it."""
    read, responses, comparisons = counts["read"], counts["responses"], counts["comparisons"]
    found = [
        (count, read, f"{count:,} of {read:,} records are skipped: {reason}", _keep(reason))
        for reason, count in counts["skipped"].items()
    ]
    for key, whole, what, keep in (
        ("duplicates_merged", responses, "responses repeat another one of their record and are merged",
         "make their texts different"),
        ("omitted", responses, "responses are not ranked and are skipped", "rank them in the data"),
        ("contradictions", comparisons, "comparisons contradict others of their record and are overruled, first in "
         f"{counts['first_contradiction']}",
         "correct them in the data"),
    ):  # fmt: skip
        found.append((counts[key], whole, f"{counts[key]:,} of {whole:,} {what}", keep))
    tokens = {"rows": 0, "responses": 0, "rows_dropped": 0, "skipped": {}, **counts.get("tokens", {})}
    rows = tokens["rows"]
    for reason, count in tokens["skipped"].items():
        found.append((count, rows, f"{count:,} of {rows:,} rows are skipped: {reason}", _keep(reason)))
    too_long = tokens["rows_dropped"] - sum(tokens["skipped"].values())
    found.append((too_long, rows, f"{too_long:,} of {rows:,} rows are skipped as too long", _LONGER))
    for key, whole, what, keep in (
        ("responses_dropped", "responses", "responses are too long and are skipped", _LONGER),
        ("responses_merged", "responses", "responses have the tokens of a better one of their row and are merged",
         "make their texts differ after the chat template"),
        ("responses_cut", "responses", "responses are truncated to max_length, and their EOS with them",
         "raise `train.max_length`"),
    ):  # fmt: skip
        count = tokens.get(key, 0)
        found.append((count, tokens[whole], f"{count:,} of {tokens[whole]:,} {what}", keep))
    return [(text, count / max(whole, count), keep) for count, whole, text, keep in found if count]


def _keep(reason: str) -> str:
    if reason == "one response":
        return "give each prompt two different responses, or train on them in a stage with `type: sft`"
    if reason == "all tied":
        return "give scores that differ (`columns.scores` may add up several), or train in a stage with `type: sft`"
    return "correct them; `on_bad_row: error` names the first one"
