"""The option `compile` of `TunaConfig`: decoder layers are compiled while training runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from tuna_peft.errors import UserError
from tuna_peft.models.base.shards import is_sharded
from tuna_peft.models.forward.compiled import compile_layers

logger = logging.getLogger("tuna_peft")


class CompiledLayers(TrainerCallback):
    """Compiles the decoder layers when training begins, and takes that back when it ends.

    Raises:
        UserError: Processes share the base: their layers gather weights, which was not tested together.
    """

    _restore: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Each kind of layer is compiled when it first runs."""
        if not args.compile:
            return
        if is_sharded(model):
            raise UserError("`compile: true` is not supported where processes share a base", fix="Leave it out.")
        self._restore = compile_layers(model)
        logger.info("decoder layers are compiled; the first steps take longer")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the layers."""
        if self._restore is not None:
            self._restore()
            self._restore = None
