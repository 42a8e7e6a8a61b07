"""Activation checkpointing, by whichever name transformers has for it."""

from __future__ import annotations

from typing import Any


def checkpoint_activations(model: Any, on: bool, **how: Any) -> None:
    """Has every layer compute its activations again in the backward pass, or none.

    Args:
        model: A transformers model, or one of PEFT around it.
        on: Every layer; else none.
        how: With `on`, for `torch.utils.checkpoint.checkpoint`.
    """
    verb = "enable" if on else "disable"
    # The name changed in transformers 5.18, and the old one warns.
    new, old = (f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient"))
    switch = getattr(model, new if hasattr(model, new) else old)
    switch(how) if on else switch()
