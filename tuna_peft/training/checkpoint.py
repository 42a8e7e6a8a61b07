"""Saves and resumes training of an adapter stack; both of our trainers (`trainer.py`, `sft.py`) use this mixin.

`Trainer` (transformers 5.23) restores only the first active adapter of a `PeftModel` when it resumes. In a stack that
is a frozen one, and the optimizer states then have the shapes of other weights. `load_best_model_at_end` has the same
defect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel
from transformers import TrainerCallback

from tuna_peft.errors import UserError
from tuna_peft.files import disk_full_is_a_user_error, flush_directory
from tuna_peft.models.stack.adapters import adapter_names, load_adapter_weights, train_top_adapter
from tuna_peft.models.stack.combined import save_sum
from tuna_peft.models.stack.files import write_stack
from tuna_peft.training.engines import DataParallel
from tuna_peft.training.resume import latest_checkpoint, require_undamaged
from tuna_peft.training.totals import Totals


class StackCheckpoints(DataParallel):
    """Mixin for trainers of a stack's top adapter; put it before the trainer class.

    Every save writes the whole stack with its manifest (`stack.json`), and its sum as one adapter that plain PEFT
    loads; every load sets the weights of the top adapter only, because the frozen ones have not changed.

    Attributes:
        totals: Sums over the whole training, resumed or not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.totals = Totals(self)
        self.add_callback(self.totals)

    def metric_sums(self) -> Any:
        """The metrics of training steps that are not logged yet, as a JSON value; saved in checkpoints."""
        return None

    def restore_metric_sums(self, sums: Any) -> None:
        """The inverse of `metric_sums`."""

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval=None):
        """Trains as `Trainer` does. `resume_from_checkpoint=True` takes the newest checkpoint that is not damaged.

        Raises:
            UserError: The checkpoint is damaged.
        """
        if resume_from_checkpoint is True:
            if (found := latest_checkpoint(self.args.output_dir)) is not None:
                resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            require_undamaged(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step; none if training was resumed at its end, where `Trainer` takes a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; the speed at the end is that of the whole training, as is its mean loss."""
        if "train_runtime" in logs:
            seconds = self.totals.seconds()
            for key in ("train_samples_per_second", "train_steps_per_second"):
                if key in logs:
                    logs[key] = round(logs[key] * logs["train_runtime"] / seconds, 3)
            logs["train_runtime"] = round(seconds, 4)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_stack(self.model, folder)
            save_sum(self.model, folder)
            self.processing_class.save_pretrained(str(folder))

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir)
        if not folder.is_dir():
            raise UserError("the output directory was deleted during training", where=str(folder))
        self.totals.save()
        with disk_full_is_a_user_error(folder):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                flush_directory(folder / f"checkpoint-{self.state.global_step}")

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
