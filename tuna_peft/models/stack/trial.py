"""Tries adapters on an empty base, on the meta device: what does not fit shows before any weight is loaded.

Runs, dry runs and plans call `check_stack` for all adapters of a recipe, and `TunaTrainer` for a model given by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig

from tuna_peft.errors import UserError
from tuna_peft.models.base.load import require_unquantized
from tuna_peft.models.forward.segments import layer_windows
from tuna_peft.models.stack.adapters import push_adapter


def check_stack(
    config: PretrainedConfig,
    adapters: Mapping[str, LoraConfig],
    *,
    model: str,
    merging: bool,
    ranking: bool,
    trust_remote_code: bool = False,
) -> PeftModel:
    """Checks by its configuration that a base can be trained with these adapters.

    Args:
        config, adapters, trust_remote_code: See `trial_stack`.
        model: The base's name, for errors.
        merging: Whether a merged model is wanted, see `require_unquantized`.
        ranking: Whether log-probabilities of packed sequences are needed.

    Returns:
        The base with the adapters, without weights.

    Raises:
        UserError: The stored weights are quantized already, layers are not attention, or see `trial_stack`.
    """
    require_unquantized(config, model, merging=merging)
    if ranking:
        layer_windows(config.get_text_config())
    return trial_stack(config, adapters, trust_remote_code=trust_remote_code)


def trial_stack(
    config: PretrainedConfig, adapters: Mapping[str, LoraConfig], *, trust_remote_code: bool = False
) -> PeftModel:
    """The base with the adapters on top, without weights.

    Args:
        config: The base's configuration.
        adapters: Configurations by name, bottom first.

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
        model = push_adapter(model, name, copy.deepcopy(lora))  # PEFT writes the modules that it found into it
    return model
