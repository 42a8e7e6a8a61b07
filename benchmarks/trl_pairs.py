"""TRL's pairwise trainers on adjacent pairs of ranked responses, (r1, r2), (r2, r3) ..., to compare their cost.

Their own `compute_loss` and collators run. The constructors, which require a tokenizer and a data set, are skipped;
the trainers get the settings of a default configuration.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import torch
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.workloads import Group


def pairs_of(groups: list[Group]) -> list[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` of the N - 1 adjacent pairs of responses to each prompt."""
    return [
        {"prompt_ids": group["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
        for group in groups
        for chosen, rejected in zip(group["completions_ids"], group["completions_ids"][1:], strict=False)
    ]


def cpo_batch(groups: list[Group]) -> dict[str, Any]:
    """A batch as `CPOTrainer.tokenize_row` and its collator make it."""
    rows = []
    for pair in pairs_of(groups):
        row: dict[str, list[int]] = {}
        for side in ("chosen", "rejected"):
            prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + response
            row[f"{side}_attention_mask"] = [1] * len(prompt + response)
            row[f"{side}_labels"] = [-100] * len(prompt) + response
        rows.append(row)
    return DPODataCollatorWithPadding(pad_token_id=0)(rows)


def dpo_batch(groups: list[Group]) -> dict[str, Any]:
    """A batch as `DPOTrainer`'s collator makes it."""
    return DataCollatorForPreference(pad_token_id=0)(pairs_of(groups))


def cpo_trainer(model: Any, device: str) -> Any:
    """A `CPOTrainer` that can `compute_loss`."""
    args = _defaults(CPOConfig)
    trainer: Any = CPOTrainer.__new__(CPOTrainer)
    for name in ("beta", "label_smoothing", "loss_type", "cpo_alpha", "alpha", "simpo_gamma"):
        setattr(trainer, name, getattr(args, name))
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = trainer._peft_has_been_casted_to_bf16 = False
    trainer.pad_token_id = 0
    trainer.accelerator = _Accelerator(device)
    trainer._stored_metrics = defaultdict(lambda: defaultdict(list))
    return trainer


def dpo_trainer(model: Any, device: str) -> Any:
    """A `DPOTrainer` that can `compute_loss`: by default, the reference model is the one without its adapter."""
    args = _defaults(DPOConfig)
    trainer: Any = DPOTrainer.__new__(DPOTrainer)
    for name in (
        "beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting",
        "precompute_ref_logps",
    ):  # fmt: skip
        setattr(trainer, name, getattr(args, name, None))
    trainer.precompute_ref_logps = getattr(args, "precompute_ref_log_probs", False)
    trainer.loss_types = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    trainer.loss_weights = [1.0] * len(trainer.loss_types)
    trainer.aux_loss_enabled = False
    trainer.args = SimpleNamespace(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}, max_length=None
    )
    trainer.model, trainer.ref_model = model, None
    trainer.accelerator = _Accelerator(device)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    fuse_head(model)
    return trainer


def fuse_head(model: Any) -> None:
    """Puts TRL's head, which computes log-probabilities in chunks, on the base model, if it is not there."""
    base = model.get_base_model()
    if not getattr(base, "_benchmark_fused_head", False):
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        base._benchmark_fused_head = True


class _Accelerator:
    """An accelerator of one process. On `meta`, where tensors have no values, metrics are zeros."""

    num_processes = 1
    parallelism_config = None

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value

    gather_for_metrics = gather

    def unwrap_model(self, model: Any) -> Any:
        return model


def _defaults(config: type) -> SimpleNamespace:
    values: dict[str, Any] = {}
    for item in fields(config):
        if item.default is not MISSING:
            values[item.name] = item.default
        elif item.default_factory is not MISSING:
            values[item.name] = item.default_factory()
    return SimpleNamespace(**values)
