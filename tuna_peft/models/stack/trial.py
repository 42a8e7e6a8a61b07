"""Tries adapters on an empty base, on the meta device: what does not fit shows before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig

from tuna_peft.errors import UserError
from tuna_peft.models.stack.adapters import push_adapter


def trial_stack(
    config: PretrainedConfig, adapters: Mapping[str, LoraConfig], *, trust_remote_code: bool = False
) -> PeftModel:
    """The base with the adapters on top, without weights.

    Args:
        config: The base's configuration.
        adapters: Configurations by name, bottom first; at least one.

    Raises:
        UserError: The model's code is missing, or an adapter does not fit the base, see `push_adapter`.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"transformers cannot build this model: {str(error).splitlines()[0]}", where=str(config._name_or_path)
        ) from error
    for name, lora in adapters.items():
        model = push_adapter(model, name, lora)
    return model
