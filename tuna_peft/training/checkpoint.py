"""Saves and resumes training of an adapter stack; both of our trainers (`trainer.py`, `sft.py`) use this mixin.

`Trainer` (transformers 5.23) restores only the first active adapter of a `PeftModel` when it resumes. In a stack that
is a frozen one, and the optimizer states then have the shapes of other weights. `load_best_model_at_end` has the same
defect.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from accelerate.utils import gather_object
from peft import PeftModel
from transformers import TrainerCallback

from tuna_peft.errors import UserError
from tuna_peft.files import disk_full_is_a_user_error
from tuna_peft.models.stack.adapters import adapter_names, load_adapter_weights, train_top_adapter
from tuna_peft.models.stack.files import write_stack
from tuna_peft.training.engines import DataParallel


class StackCheckpoints(DataParallel):
    """Mixin for trainers of a stack's top adapter; put it before the trainer class.

    Every save writes the whole stack with its manifest (`stack.json`); every load sets the weights of the top adapter
    only, because the frozen ones have not changed.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_stack(self.model, folder)
            self.processing_class.save_pretrained(str(folder))

    def _save_checkpoint(self, model, trial) -> None:
        with disk_full_is_a_user_error(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if isinstance(self.model, PeftModel):
            self._load_top_adapter(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            self._load_top_adapter(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_top_adapter(self, checkpoint: str) -> None:
        top = adapter_names(self.model)[-1]
        load_adapter_weights(self.model, top, Path(checkpoint) / top)
        train_top_adapter(self.model)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in a trainer's output folder.

    `trainer_state.json` is written last: a checkpoint without a readable one was interrupted, and is ignored.
    """

    def step(path: Path) -> int:
        return int(path.name.rpartition("-")[2])

    named = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]{1,18}", path.name)]
    for path in sorted(named, key=step, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        return path
    return None


class StopOnRequest(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `requested` is set (by Ctrl-C).

    With several processes, one request stops all: a process that stopped earlier would leave the others waiting.
    """

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.requested = any(gather_object([self.requested]))
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control


def require_trainable(model) -> None:
    """Raises UserError when the model has no trainable parameter."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no parameter of the model is trainable",
            fix="Pass a peft_config, or a PeftModel whose top adapter is trainable.",
        )
