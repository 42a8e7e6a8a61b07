"""The implementations of a ranking step that are compared (arms), by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks import ours, reference, trl_pairs, trl_tree
from benchmarks.workloads import RESPONSES, Group
from tuna_peft.data.batch import PackedBatch
from tuna_peft.limits import GIB

Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """One implementation of a ranking step.

    Attributes:
        batch: Makes a micro-batch from prompts with their responses.
        loss: Makes, from `(model, device)`, a function from the micro-batch to the loss.
        agrees: Whether it computes the Tuna loss, so that it can be compared with the reference.
        checkpointing: Whether it uses gradient checkpointing if the run has it.
        gpu_bytes: Memory of a GPU that it fills with kept activations, `auto` for that of the device; None for
            gradient checkpointing in all layers.
        fused: Whether LoRA layers compute all adapters in one product; else PEFT's layers are used.
        compiled: Whether the decoder layers are compiled; on a GPU only.
    """

    batch: Callable[[list[Group]], dict[str, Any] | PackedBatch]
    loss: Callable[[Any, str], Loss]
    agrees: bool = True
    checkpointing: bool = True
    gpu_bytes: float | Literal["auto"] | None = None
    fused: bool = True
    compiled: bool = False


def _plain(loss: Callable[..., torch.Tensor]) -> Callable[[Any, str], Loss]:
    return lambda model, device: partial(loss, model, responses=RESPONSES)


def _of_trainer(make: Callable[[Any, str], Any]) -> Callable[[Any, str], Loss]:
    return lambda model, device: partial(make(model, device).compute_loss, model)


ARMS = {
    "reference": Arm(reference.batch_of, _plain(reference.loss_of), fused=False),
    "trl-cpo": Arm(trl_pairs.cpo_batch, _of_trainer(trl_pairs.cpo_trainer), agrees=False, fused=False),
    "trl-dpo": Arm(trl_pairs.dpo_batch, _of_trainer(trl_pairs.dpo_trainer), agrees=False, fused=False),
    "trl-tree": Arm(trl_tree.batch_of, _plain(trl_tree.loss_of), agrees=False, fused=False),
    "ours": Arm(ours.batch_of, _plain(ours.loss_of)),
    "ours-no-checkpointing": Arm(ours.batch_of, _plain(ours.loss_of), checkpointing=False),
    "ours-auto": Arm(ours.batch_of, _plain(ours.loss_of), gpu_bytes="auto"),
    "ours-24gb": Arm(ours.batch_of, _plain(ours.loss_of), gpu_bytes=24 * GIB),
    "ours-compiled": Arm(ours.batch_of, _plain(ours.loss_of), gpu_bytes="auto", compiled=True),
    "ours-dense-mask": Arm(ours.batch_of, _plain(ours.loss_with_dense_mask)),
    "ours-peft-lora": Arm(ours.batch_of, _plain(ours.loss_of), fused=False),
    "ours-share-prompt-only": Arm(partial(ours.batch_of, share_responses=False), _plain(ours.loss_of)),
    "ours-separate-rows": Arm(ours.separate_rows, _plain(ours.loss_of)),
    "ours-full-logits": Arm(ours.batch_of, _plain(ours.loss_with_full_logits)),
}


def to_device(batch: dict[str, Any] | PackedBatch, device: str) -> dict[str, Any] | PackedBatch:
    """Moves the tensors of a batch."""
    if isinstance(batch, PackedBatch):
        return ours.to_meta(batch) if device == "meta" else batch.to(device)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
