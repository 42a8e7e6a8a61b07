"""Decoder layers compiled by `torch.compile`, each as one graph for any number of tokens.

Layers of one kind share the compiled code. Outside of it stay gradient checkpointing, which is chosen for each pass;
passes without gradients, which would compile every layer once more; and long sequences where no kernel takes all
segments at once, because their number differs from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tuna_peft.models.forward.scoring import unwrap
from tuna_peft.models.forward.segments import has_varlen_attention

# In which method transformers checkpoints a layer depends on its version.
_IN_FORWARD = "__call__" not in GradientCheckpointingLayer.__dict__


def decoder_layers(model: Any) -> list[Any]:
    """The layers of `model` that can recompute their activations, in order."""
    return [module for module in unwrap(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: Any, backend: str = "inductor") -> Callable[[], None]:
    """Compiles the training passes of all decoder layers; each is compiled when it first runs.

    Args:
        model: A transformers model, or a `PeftModel` around one.
        backend: A backend of `torch.compile`.

    Returns:
        A function that takes the change back.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = _compiled(layer, backend)

    def restore() -> None:
        for layer in layers:
            del layer.forward

    return restore


def _compiled(layer: Any, backend: str) -> Callable[..., Any]:
    eager = layer.forward
    compiled = torch.compile(eager, dynamic=True, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        flag, layer.gradient_checkpointing = layer.gradient_checkpointing, False
        try:
            return compiled(*args, **kwargs)
        finally:
            layer.gradient_checkpointing = flag

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        traceable = kwargs.get("segments") is None or has_varlen_attention(hidden.device)
        if not (layer.training and torch.is_grad_enabled() and traceable):
            return eager(*args, **kwargs)
        if layer.gradient_checkpointing and _IN_FORWARD:
            return layer._gradient_checkpointing_func(partial(run, **kwargs), *args)
        return run(*args, **kwargs)

    return forward
