"""Loading a teacher or a judge that runs on this machine."""

from __future__ import annotations

from functools import partial

from tuna_peft.feedback.settings import LocalModelSettings
from tuna_peft.models.stack.any_model import load_any_model, local_stack
from tuna_peft.models.stack.files import AdapterStack
from tuna_peft.models.stack.manifest import read_manifest
from tuna_peft.models.workers import load_for_all


def local_base(settings: LocalModelSettings) -> tuple[str, str | None]:
    """Model and revision whose tokenizer a local teacher or judge has: its own, or those of its stack's base."""
    assert settings.model is not None
    if (stack := local_stack(settings.model)) is None:
        return settings.model, settings.revision
    base = read_manifest(stack).base
    return base["model"], base["revision"]


def load_local_model(settings: LocalModelSettings, device: str) -> AdapterStack:
    """The model that the settings name.

    Args:
        settings: With `model`.
        device: The recipe's `base.device` or the command's `--device`, see `resolve_device`. Teachers and judges share
            this rule: a run that must not touch a GPU must not load its judge there, and the planner counts on it.

    Raises:
        UserError: The model cannot be loaded.
    """
    assert settings.model is not None
    load = partial(
        load_any_model,
        settings.model,
        revision=settings.revision,
        quantization=settings.quantization,
        device=device,
        trust_remote_code=settings.trust_remote_code,
    )
    return load_for_all(load)
