"""What `TunaTrainer` is given by its user: a model by name, and data in any form that trainers are used with."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.collate import total_length
from tuna_peft.data.tokenize import encode_dataset, require_known_ids, require_scores
from tuna_peft.errors import UserError
from tuna_peft.limits import within_context
from tuna_peft.models.base.load import load_base, load_config
from tuna_peft.models.stack.trial import check_stack
from tuna_peft.training.combinations import needs_scores
from tuna_peft.training.config import TunaConfig


def load_model(
    name: str,
    args: TunaConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: LoraConfig | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of that name, trainable if no adapter is added to it, and its tokenizer unless one is given.

    Raises:
        UserError: It is quantized and no adapter is added; it cannot be loaded; or see `check_stack`.
    """
    if quantization_config is not None and peft_config is None:
        raise UserError("a quantized base cannot be trained itself", fix="Pass a peft_config.")
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    code = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    config = load_config(name, revision=options.get("revision"), **code)
    adapters = {} if peft_config is None else {args.adapter_name: peft_config}
    check_stack(config, adapters, model=name, merging=False, ranking=True, **code)
    base = load_base(name, quantization_config=quantization_config, **options)
    base.model.requires_grad_(peft_config is None)
    return base.model, tokenizer or base.tokenizer


def encoded_rows(
    data: Any, tokenizer: PreTrainedTokenizerBase, args: TunaConfig, context: int | None, vocabulary: int | None
) -> Dataset:
    """Tokenized rows, with their lengths where the sampler groups by length.

    Args:
        data: Raw or tokenized rows: a `Dataset`, a list of dicts, or a PyTorch data set with a length.
        context: Maximum length of the model.
        vocabulary: Number of rows of its embedding.

    Raises:
        UserError: The rows are streamed, or not ranked, or one of them is invalid, too long, or has an unknown token.
    """
    dataset = _as_dataset(data)
    if "prompt_ids" not in dataset.column_names:
        if {"prompt", "completion"} <= set(dataset.column_names):
            raise UserError(
                "the data set has one completion per prompt (columns prompt and completion): nothing can be ranked",
                fix="Use trl's SFTTrainer, or give several `completions` with `scores` or `ranks` to each prompt.",
            )
        try:
            dataset, _ = encode_dataset(
                dataset, tokenizer, max_length=within_context(args.max_length, context), overflow=args.overflow,
                needs_reference=args.mle_on == "reference",
            )  # fmt: skip
        except BadRow as error:
            raise UserError(error.what, where=error.where, fix=_fix_without_recipe(error)) from error
    if vocabulary is not None:
        require_known_ids(dataset, tokenizer, vocabulary)
    if needs_scores(args.loss_type, args.margin_by, args.pair_weight):
        require_scores(dataset)
    if args.train_sampling_strategy == "group_by_length" and args.length_column_name not in dataset.column_names:
        # `Trainer` would measure `input_ids`, which ranked rows do not have.
        dataset = dataset.add_column(args.length_column_name, [total_length(row) for row in dataset])
    return dataset


def _fix_without_recipe(error: BadRow) -> str | None:
    """What to do about a row, in arguments: the errors of `tuna_peft.data` speak of the keys of recipes."""
    if error.reason in ("prompt too long", "response too long"):
        shorten = ', truncate responses with overflow="cut"' if error.reason == "response too long" else ""
        return f'In TunaConfig, raise max_length{shorten}, or skip such rows with overflow="skip".'
    if error.fix and "`rendering: " in error.fix:
        return (
            "Remove it from the data, or pass rows that are tokenized already: `encode_dataset(dataset, tokenizer, "
            'max_length=..., overflow=..., prompt=PromptConfig(rendering="verbatim"))[0]` of tuna_peft.data.tokenize '
            '(or "lenient").'
        )
    return "Correct the row, or remove it from the data set." if error.fix and "on_bad_row" in error.fix else error.fix


def _as_dataset(data: Any) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if isinstance(data, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        raise UserError(
            "a streamed data set cannot be used: every row is checked and measured before training",
            fix="Read it first: `Dataset.from_list(list(rows))`.",
        )
    try:
        return Dataset.from_list([dict(data[index]) for index in range(len(data))])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"a {type(data).__name__} cannot be read as rows: {str(error).splitlines()[0]}",
            fix="Give a `datasets.Dataset`, or a list of dicts with prompt, completions and scores or ranks.",
        ) from error
