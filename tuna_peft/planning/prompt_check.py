"""Warns of a chat model whose recipe leaves the default prompt template, which the model has never seen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tuna_peft.data.load import source_format
from tuna_peft.data.sources import is_here
from tuna_peft.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("tuna_peft")


def warn_of_default_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Logs a warning where instructions are put into the Alpaca template by default, and the model has its own."""
    if tokenizer is None or not tokenizer.chat_template or "template" in recipe.prompt.model_fields_set:
        return
    for stage in recipe.stages:
        source = stage.source
        if source.columns is not None:
            wrapped = source.columns.instruction is not None
        else:
            name = source_format(source)[0] if source.format == "auto" and is_here(source.path) else source.format
            wrapped = name in ("alpaca", "teacher", "auto")
        if wrapped:
            logger.warning(
                "%s is a chat model, and the recipe leaves the default prompt template (Alpaca) for the instructions "
                "of stage %s; write `prompt: {template: chat}` to use the model's own, or "
                "`prompt: {template: alpaca}` to keep this one",
                recipe.base.model,
                stage.name,
            )
            return
