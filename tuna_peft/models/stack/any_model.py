"""Whatever a user calls a model: a run's folder, a stack, a merged model, a Hub id, `builtin:`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.config import PromptConfig
from tuna_peft.errors import UserError
from tuna_peft.files import unreadable_is_a_user_error
from tuna_peft.json_text import read_json
from tuna_peft.models.base.load import (
    base_identity,
    load_base,
    make_quantization_config,
    resolve_device,
    resolve_dtype,
)
from tuna_peft.models.forward.scoring import without_peft
from tuna_peft.models.stack.adapters import adapter_names, fingerprint
from tuna_peft.models.stack.files import AdapterStack, quantization_of
from tuna_peft.models.stack.manifest import refuse_begun_run


def load_any_model(
    model: str,
    *,
    upto: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    quantization: str = "none",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> AdapterStack:
    """A stack, or any other model as a stack of no adapters.

    Args:
        model: A run's folder, a stack's, a merged model's, a Hub id, or `builtin:pico-llama`.
        upto: Of a stack: with the adapters up to this one.
        base_model: Of a stack: where its base is now.
        revision: Of a model on the Hub: branch, tag or commit.
        quantization: Of a single model: `nf4`, `fp4`, `int8` or `none`; a stack has that of its training.
        device: See `load_base`.
        trust_remote_code: See `load_base`.

    Raises:
        UserError: It cannot be loaded, or `upto` is given for a single model.
    """
    if (stack := local_stack(model)) is not None:
        return AdapterStack.from_pretrained(
            stack, upto=upto, base_model=base_model, device=device, trust_remote_code=trust_remote_code
        )
    if upto is not None:
        raise UserError("`upto` goes with a stack; this is a single model", where=model)
    compute = resolve_dtype("auto", resolve_device(device))
    base = load_base(
        model,
        revision=revision,
        quantization_config=make_quantization_config(quantization, compute_dtype=compute),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    record = Path(model) / "tuna_export.json"
    with unreadable_is_a_user_error(record, "record of an export"):
        prompt = read_json(record)["stack"]["prompt"] if record.is_file() else {}
        PromptConfig.model_validate(prompt)
    return AdapterStack(base.model, base.tokenizer, prompt)


def local_stack(model: str) -> Path | None:
    """The folder of a stack, of a run's stack, or of a lone adapter (which is refused later, with the reason).

    Raises:
        UserError: A run without a stage that has ended.
    """
    for folder in (Path(model) / "stack", Path(model)):
        if (folder / "stack.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    refuse_begun_run(Path(model))
    return None


def model_digest(model: torch.nn.Module, adapters: Sequence[str] | None = None) -> dict[str, Any]:
    """What a model's outputs depend on, as plain JSON: where its base is from, its quantisation, every adapter.

    Args:
        adapters: Those that are active; all of them by default.
    """
    base = without_peft(model)
    names = adapter_names(model) if adapters is None else adapters
    return {
        "base": base_identity(base),
        "quantization": quantization_of(base),
        "adapters": {name: fingerprint(model, name) for name in names},
    }


def usual_prompt(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The prompt template of a model of which none is recorded."""
    return {"template": "chat" if tokenizer.chat_template else "alpaca"}
