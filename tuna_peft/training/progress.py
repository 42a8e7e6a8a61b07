"""The progress bar of a training stage in a run: remaining time, loss and ranking metrics."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import TrainerCallback

_SHOWN = ("loss", "ranking_accuracy", "margin_satisfaction", "mean_token_accuracy")


class StageProgress(TrainerCallback):
    """Replaces the progress bar of `Trainer` and the dictionaries that it prints."""

    def __init__(self, name: str):
        self.name = name
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None:
            self.bar.set_postfix({key: f"{logs[key]:.3f}" for key in _SHOWN if key in (logs or {})})

    def close(self) -> None:
        """Closes the bar; later output starts on a new line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
