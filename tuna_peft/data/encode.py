"""Reads a data set of a recipe and tokenizes it, for training stages and for the evaluation task `ranking`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.data.config import DataSource, Overflow, PromptConfig
from tuna_peft.data.ranked import ReadReport
from tuna_peft.data.tokenize import encode_dataset
from tuna_peft.errors import UserError
from tuna_peft.limits import context_length, within_context


def encode_source(
    source: DataSource,
    load: Callable[[DataSource, PromptConfig], tuple[Dataset, ReadReport]],
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    max_length: int | None,
    overflow: Overflow,
    needs_reference: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Reads `source` with `load` and encodes it, within `max_length` and the context length of the model.

    Returns:
        The encoded rows, and the counts of records and rows that were read, kept, merged and skipped.

    Raises:
        UserError: See `tuna_peft.data.load` and `tuna_peft.data.tokenize`; the message names the file.
    """
    dataset, read = load(source, prompt)
    limit = within_context(max_length, context_length(config))
    try:
        encoded, tokens = encode_dataset(
            dataset, tokenizer, max_length=limit, overflow=overflow, on_bad_row=source.on_bad_row,
            needs_reference=needs_reference,
        )  # fmt: skip
    except UserError as error:
        place = f"{source.path}: {error.where}" if error.where else source.path
        raise UserError(error.what, where=place, fix=error.fix) from error
    return encoded, {**read.as_dict(), "tokens": tokens.as_dict()}
