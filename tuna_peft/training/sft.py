"""Supervised fine-tuning of a stack's top adapter with TRL's `SFTTrainer`; used for the `sft` stages of a recipe."""

from __future__ import annotations

import torch
from trl import SFTTrainer

from tuna_peft.training.checkpoint import StackCheckpoints
from tuna_peft.training.finite import SkippedSteps, require_finite_loss


class StackSFTTrainer(StackCheckpoints, SFTTrainer):
    """TRL's `SFTTrainer` on a `PeftModel`: trains its top adapter, saves and resumes the whole stack.

    Takes the arguments of `trl.SFTTrainer`; `model` is a `PeftModel` made by `push_adapter`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SkippedSteps())
        # TRL 1.16 casts the adapters of a quantized base to bf16. On a T4 (fp16) the gradient scaler fails on bf16
        # gradients, and everywhere bf16 weights round away the small updates at the end of training.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)

    def metric_sums(self):
        """The metrics that are not logged yet, and the number of tokens so far."""
        return {"tokens": self._total_train_tokens, "metrics": dict(self._metrics["train"])}

    def restore_metric_sums(self, sums):
        """Puts them back."""
        self._total_train_tokens = sums["tokens"]
        self._metrics["train"].update(sums["metrics"])
        self.model.train()  # TRL logs the metrics of the mode that the model is in

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        require_finite_loss(self, loss)
        return loss

    def create_model_card(self, *args, **kwargs):
        """Writes no card: the export writes one for the whole stack."""

    def _send_telemetry(self):
        """Sends nothing: a run contacts no server on its own."""
