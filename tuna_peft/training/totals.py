"""Sums over a whole training, also where it was resumed: loss, metrics that are not logged yet, time, peak memory.

`Trainer` (transformers 5.23) keeps these sums for one process: the mean loss of a resumed training would be that of
its last steps, and the first value that it logs would leave out the steps before the checkpoint.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from tuna_peft.limits import peak_rss_bytes

# The key in `TrainerState.stateful_callbacks`, which is saved in the checkpoint's `trainer_state.json`. It must not be
# the name of a class: `Trainer` would try to make an object of it.
_KEY = "tuna_peft"


class Totals(TrainerCallback):
    """Saves the sums in checkpoints, and restores them when training is resumed.

    It also saves a checkpoint at the end of an epoch after what `Trainer` logs and evaluates there, because a training
    that is resumed does not come back to that end.

    Args:
        trainer: The trainer, with the methods `metric_sums` and `restore_metric_sums`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._seconds, self._peak, self._began = 0.0, 0, time.monotonic()  # of earlier processes; and of this one
        self._step, self._save_later = 0, False  # where this process began; whether to save at the end of the epoch

    def seconds(self) -> float:
        """Time in training, without what was repeated after an interruption."""
        return self._seconds + time.monotonic() - self._began

    def peak_memory(self) -> int:
        """Peak memory in bytes: of the GPU's allocator; on a CPU, of the process since its start."""
        device = self._trainer.args.device
        own = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes() or 0
        return max(self._peak, own)

    def save(self) -> None:
        """Puts the sums of all processes into the trainer's state, which is saved next."""
        trainer: Trainer = self._trainer
        own = {
            "loss": trainer._total_loss_scalar,
            "loss_since_log": trainer._tr_loss.item(),
            "last_log": trainer._globalstep_last_logged,
            "metrics": self._trainer.metric_sums(),
            "seconds": self.seconds(),
            "peak_memory": self.peak_memory(),
        }
        trainer.state.stateful_callbacks[_KEY] = gather_object([own])

    def on_train_begin(self, args, state, control, **kwargs):
        self._step, self._save_later = state.global_step, False
        self._seconds, self._peak, self._began = 0.0, 0, time.monotonic()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        sums = state.stateful_callbacks.get(_KEY)
        if not state.global_step or not sums:
            return
        own = sums[args.process_index if len(sums) == args.world_size else 0]
        trainer = self._trainer
        trainer._total_loss_scalar, trainer._globalstep_last_logged = own["loss"], own["last_log"]
        trainer._tr_loss += own["loss_since_log"]
        trainer._initial_global_step = 0  # what `Trainer` divides the loss by begins here
        trainer.restore_metric_sums(own["metrics"])
        self._seconds, self._peak = own["seconds"], own["peak_memory"]

    def on_step_end(self, args, state, control, **kwargs):
        self._save_later = control.should_save and (
            state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        )
        if self._save_later:
            control.should_save = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:  # resumed at its end: the checkpoint was written after all of this
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._save_later:
            control.should_save, self._save_later = True, False
        return control
