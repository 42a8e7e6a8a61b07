"""Stops training when the loss is not finite, and reports fp16 steps that are skipped again and again.

Both of our trainers use it: later steps would train on NaN, and write adapters of NaN over good checkpoints.
"""

from __future__ import annotations

import logging

import torch
from transformers import Trainer, TrainerCallback

from tuna_peft.errors import UserError

logger = logging.getLogger("tuna_peft")

# The loss scale starts at 2**16 and halves with every skipped step: fewer skipped steps than this are usual.
MOST_SKIPPED = 16


def require_finite_loss(trainer: Trainer, loss: torch.Tensor) -> None:
    """Checks the loss of a batch after its backward pass.

    Raises:
        UserError: It is NaN or infinite; with the step, learning rate, largest gradient, and what to try.
    """
    if torch.isfinite(loss):
        return
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    largest = max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
    before = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    seen = f", gradient norm of the last logged step {before[-1]:.3g}" if before else ""
    rate = trainer.lr_scheduler.get_last_lr()[0] if trainer.lr_scheduler is not None else trainer.args.learning_rate
    fix = "Lower learning_rate, add warmup_steps, and keep max_grad_norm at 1 or lower."
    if trainer.args.fp16:
        fix += " fp16 overflows beyond 65,504: try bf16 (GPUs from Ampere on) or fp32."
    raise UserError(
        f"the loss is {float(loss)} in step {trainer.state.global_step + 1} (learning rate {rate:.3g}, largest "
        f"gradient {largest:.3g}{seen}): training has diverged and stops here",
        where=str(trainer.args.output_dir),
        fix=f"{fix} Checkpoints from before this step are still good.",
    )


class SkippedSteps(TrainerCallback):
    """Warns when fp16's gradient scaler skips many optimizer steps in a row, because gradients overflow."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self._in_a_row = self._in_a_row + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self._in_a_row and self._in_a_row % MOST_SKIPPED == 0:
            logger.warning(
                "fp16: the last %d optimizer steps were skipped, because gradients overflow, so nothing was trained; "
                "lower learning_rate, or use bf16 or fp32",
                self._in_a_row,
            )
