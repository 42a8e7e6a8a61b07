"""The progress of a training stage in a run: remaining time, loss and ranking metrics; and its metrics in the log."""

from __future__ import annotations

import logging

from transformers import TrainerCallback

from tuna_peft.progress import Progress

logger = logging.getLogger("tuna_peft")

# What the bar shows, by name in the log history: short, for 80 columns.
_SHOWN = {"loss": "loss", "ranking_accuracy": "accuracy", "mean_token_accuracy": "accuracy"}


class StageProgress(TrainerCallback):
    """Replaces the progress bar of `Trainer` and the dictionaries that it prints."""

    def __init__(self, name: str):
        self.name = name
        self.progress: Progress | None = None
        self._shown = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._shown = state.global_step
            self.progress = Progress(self.name, state.max_steps, "steps", done=state.global_step, keep=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(state.global_step - self._shown)
            self._shown = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress is not None and logs:
            if numbers := {name: f"{logs[key]:.3f}" for key, name in _SHOWN.items() if key in logs}:
                self.progress.show(**numbers)
            values = " ".join(f"{key}={value:.6g}" for key, value in logs.items() if isinstance(value, (int, float)))
            logger.debug("%s: step %d of %d: %s", self.name, state.global_step, state.max_steps, values)

    def close(self) -> None:
        """Closes the bar; later output starts on a new line."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None
