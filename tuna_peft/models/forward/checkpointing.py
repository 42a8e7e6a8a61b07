"""Switches gradient checkpointing on and off, under the old and the new name that transformers has for it.

Used after a training stage, by `tuna-peft doctor` and by benchmarks; during training `Trainer` does it.
"""

from __future__ import annotations

from typing import Any


def checkpoint_activations(model: Any, on: bool, **how: Any) -> None:
    """Turns gradient checkpointing on or off in every layer.

    Args:
        model: A transformers model, or a `PeftModel` around one.
        on: Whether layers recompute their activations in the backward pass.
        how: Keyword arguments for `torch.utils.checkpoint.checkpoint`; only with `on`.
    """
    verb = "enable" if on else "disable"
    # transformers 5.18 renamed it; the old name gives a warning there.
    new, old = (f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient"))
    switch = getattr(model, new if hasattr(model, new) else old)
    switch(how) if on else switch()
