"""Checks the options of a stage before a model is loaded: combinations and packages that the trainer would miss later.

`tuna_peft.run.checks` calls `require_possible` for every stage of a recipe, and `TunaTrainer` for its own options.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from tuna_peft.errors import UserError


def require_possible(config: TrainingArguments, *, where: str) -> None:
    """Checks what a trainer finds out only when it is made, or even at its first step.

    Args:
        config: The configuration of the trainer.
        where: The place of the options, for the error.

    Raises:
        UserError: A package is missing, or an option cannot work with our data, with another option, or at all.
    """
    if wrong := _impossible(config):
        raise UserError(wrong[0], where=where, fix=wrong[1])
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "use_liger_kernel: the package is not installed", where=where, fix="Install it: pip install liger-kernel."
        )
    try:
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"report_to: {_line(error)}", where=where, fix="Or set report_to: none.") from error
    _require_optimizer_and_scheduler(config, where)


def _impossible(config: TrainingArguments) -> tuple[str, str] | None:
    """The first option that cannot work, and what to do about it."""

    def option(name: str) -> bool:
        return bool(getattr(config, name, False))

    workers = config.dataloader_num_workers
    length = getattr(config, "max_length", None)
    for wrong, what, fix in (
        (
            option("assistant_only_loss"),
            "assistant_only_loss needs conversations, and the data of a stage is a prompt with one response",
            "Remove it: the loss covers the response only (completion_only_loss).",
        ),
        (
            option("padding_free") and not option("packing") and length is not None,
            "padding_free does not enforce max_length",
            "Set packing: true, or max_length: null.",
        ),
        (option("activation_offloading"), "activation_offloading does not work with a stack", "Remove it."),
        (
            option("dataloader_persistent_workers") and not workers,
            "dataloader_persistent_workers needs workers",
            "Set dataloader_num_workers: 1 or more.",
        ),
        (
            config.save_strategy == "best" and config.eval_strategy == "no",
            "save_strategy: best needs an evaluation during training",
            "Use steps or epoch: a run evaluates after each stage.",
        ),
        (bool(config.fsdp), "fsdp would also shard the adapters", "Use `--launch fsdp2` to shard the base."),
    ):
        if wrong:
            return what, fix
    return None


def _require_optimizer_and_scheduler(config: TrainingArguments, where: str) -> None:
    """Makes both as the trainer does later, for a single weight."""
    weight = torch.nn.Linear(1, 1)
    try:
        Trainer.get_optimizer_cls_and_kwargs(config, weight)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        # Optimizers that choose modules by name find none in a single layer: for them only the package is checked.
        if isinstance(error, ImportError) or not config.optim_target_modules:
            raise UserError(
                f"optim {_name(config.optim)}: {_line(error)}", where=where, fix="Or use optim: adamw_torch."
            ) from error
    try:
        get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD(weight.parameters()),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"lr_scheduler_type {_name(config.lr_scheduler_type)}: {_line(error)}",
            where=where,
            fix="Correct lr_scheduler_kwargs.",
        ) from error


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))  # an enumeration's, or text already


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
