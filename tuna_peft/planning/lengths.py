"""How long a recipe's data is: exactly, where it is encoded already; from a part of it, for a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuna_peft.data.config import DataSource, Overflow
from tuna_peft.data.ranked import Record
from tuna_peft.data.sources import count_selected
from tuna_peft.planning.workload import ASSUMED_RESPONSES, ASSUMED_ROWS, Row, Workload
from tuna_peft.recipe.schema import Recipe

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sft", "ranking", "prompts", "candidates"]

# Rows that a plan tokenises: the longest by characters, and as many spread over the rest.
LONGEST, SPREAD = 200, 800
# Without a tokenizer. Alpaca-style English has 3.7 to 4.6 under the vocabularies of LLaMA to Qwen3: fewer is cautious.
CHARACTERS_PER_TOKEN = 3.5
_BY_CHARACTERS = f"counted in characters, {CHARACTERS_PER_TOKEN} to a token (no tokenizer here)"


def encoded_workload(dataset: datasets.Dataset) -> Workload:
    """The exact lengths of encoded rows, ranked or supervised, see `tuna_peft.data.tokenize.encode_dataset`."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length
    table: Any = dataset.with_format("arrow")[:]
    if "completions_ids" in table.column_names:
        responses = iter(lengths(pyarrow.compute.list_flatten(table["completions_ids"])).to_pylist())
        counts = lengths(table["completions_ids"]).to_pylist()
        rows = [
            Row(prompt, tuple(next(responses) for _ in range(count)))
            for prompt, count in zip(lengths(table["prompt_ids"]).to_pylist(), counts, strict=True)
        ]
    else:
        carrying = [sum(mask) for mask in table["completion_mask"].to_pylist()]
        whole = lengths(table["input_ids"]).to_pylist()
        rows = [Row(length - own, (own,)) for length, own in zip(whole, carrying, strict=True)]
    return Workload(tuple(rows), len(rows), f"counted in tokens: {len(rows):,} rows")


def is_here(source: DataSource) -> bool:
    """Whether the data is a file of this machine or of the package."""
    return source.path.startswith("builtin:") or Path(source.path).exists()


def source_workload(
    source: DataSource,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    kind: Kind,
    max_length: int | None = None,
    overflow: Overflow = "skip",
    assumed: int = ASSUMED_ROWS,
) -> Workload:
    """The lengths of a data set that is a file here; typical ones for any other.

    Args:
        tokenizer: None counts characters.
        assumed: Rows of a data set that is not here, before its slice.

    Raises:
        UserError: The file cannot be used.
    """
    if not is_here(source):
        total = count_selected(source, assumed)
        sliced = "[" in source.split
        how = f" ({source.split} of {assumed:,})" if sliced and total < assumed else ""
        responses = {"sft": 1, "prompts": 0}.get(kind, ASSUMED_RESPONSES)
        return Workload.assumed(responses, max_length, total, how)

    from tuna_peft.data.load import load_candidates, load_prompts, load_ranked, load_sft

    if kind in ("prompts", "candidates"):
        read = load_prompts if kind == "prompts" else load_candidates
        return records_workload(read(source, recipe.prompt)[0], tokenizer)

    dataset = (load_sft if kind == "sft" else load_ranked)(source, recipe.prompt)[0]
    chosen = dataset.select(_some(range(len(dataset)), key=lambda index: _characters(dataset[index])))
    if tokenizer is None:
        return _by_characters(chosen, len(dataset))
    from tuna_peft.data.tokenize import encode_dataset

    encoded, _ = encode_dataset(
        chosen, tokenizer, max_length=max_length, overflow=overflow, on_bad_row=source.on_bad_row
    )
    part = f", from {len(chosen):,} of them" if len(chosen) < len(dataset) else ""
    workload = encoded_workload(encoded)
    total = round(len(dataset) * len(encoded) / len(chosen))
    return dataclasses.replace(workload, total=total, source=f"counted in tokens: {len(dataset):,} rows{part}")


def records_workload(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | None) -> Workload:
    """The lengths of prompts, with the responses that some of them may have; exact where there are few.

    Args:
        records: `{"prompt"}` and optional `completions`.
        tokenizer: None counts characters.
    """
    responses = any(record.get("completions") for record in records)
    note = f"{len(records):,} prompts{' with responses' if responses else ''}"
    if tokenizer is None:
        rows = [
            Row(_in_tokens(record["prompt"]), tuple(map(_in_tokens, record.get("completions") or [""])))
            for record in records
        ]
        return Workload(tuple(rows), len(records), f"{note}, {_BY_CHARACTERS}")
    from tuna_peft.data.texts import TextTokenizer, prompt_ids

    tokens, rows = TextTokenizer(tokenizer), []
    for record in _some(records, key=_characters):
        texts = record.get("completions")
        lengths = [len(ids) + 1 for ids in tokens(texts, special=False)] if texts else [0]  # EOS is part of it
        rows.append(Row(len(prompt_ids(record["prompt"], tokenizer)), tuple(lengths)))
    return Workload(tuple(rows), len(records), note)


def _some(items: Any, key: Any = len) -> list[Any]:
    """The longest, and some of the others."""
    if len(items) <= LONGEST + SPREAD:
        return list(items)
    by_length = sorted(items, key=key, reverse=True)
    rest = by_length[LONGEST:]
    return by_length[:LONGEST] + rest[:: max(len(rest) // SPREAD, 1)]


def _by_characters(dataset: datasets.Dataset, total: int) -> Workload:
    rows = []
    for record in dataset:
        responses = record.get("completions") or [record["completion"]]
        rows.append(Row(_in_tokens(record["prompt"]), tuple(map(_in_tokens, responses))))
    return Workload(tuple(rows), total, f"{total:,} rows, {_BY_CHARACTERS}")


def _in_tokens(text: Any) -> int:
    return round(_characters(text) / CHARACTERS_PER_TOKEN) + 1


def _characters(part: Any) -> int:
    """Of a text, of messages, or of all of a record's texts."""
    if isinstance(part, str):
        return len(part)
    if isinstance(part, dict):
        texts = (part.get(key) for key in ("prompt", "completion", "completions", "content"))
        return sum(_characters(text) for text in texts if text)
    return sum(map(_characters, part))
