"""Supervised fine-tuning of a stack's top adapter by TRL's `SFTTrainer`."""

from __future__ import annotations

import torch
from trl import SFTTrainer

from tuna_peft.training.checkpoint import StackCheckpoints


class StackSFTTrainer(StackCheckpoints, SFTTrainer):
    """TRL's `SFTTrainer` on a `PeftModel`: trains its top adapter, saves and resumes the whole stack.

    Takes the arguments of `trl.SFTTrainer`; `model` is a `PeftModel` made by `push_adapter`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # TRL casts the adapters of a quantised base to bf16: fp16's gradient scaler refuses those on a T4, and bf16
        # weights round away the small steps of late training.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)

    def create_model_card(self, *args, **kwargs):
        """None: the card is written by the export, of the whole stack."""

    def _send_telemetry(self):
        """None: a run talks to nobody."""
