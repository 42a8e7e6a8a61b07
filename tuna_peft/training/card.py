"""The model card of `TunaTrainer`'s output folder; a finished run gets its own, see `tuna_peft.export.card`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import Trainer

import tuna_peft
from tuna_peft.markup import render
from tuna_peft.models.base.load import model_id
from tuna_peft.models.forward.scoring import without_peft
from tuna_peft.models.stack.adapters import adapter_names

_SETTINGS = (
    "loss_type", "margin", "reduction", "length_penalty", "mle_weight", "mle_on", "learning_rate", "num_train_epochs",
    "max_steps", "seed",
)  # fmt: skip


def trainer_card(trainer: Trainer, name: str, dataset: str | None, tags: Sequence[str]) -> str:
    """The README.md of a trainer's output folder, metadata included."""
    base, stages = model_id(without_peft(trainer.model)), adapter_names(trainer.model)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    wanted = ("eval_loss", "eval_ranking_accuracy", "eval_margin_satisfaction")
    metadata = ModelCardData(
        # The Hub rejects a card whose base is a local path.
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        datasets=[dataset] if dataset else None,
        library_name="peft" if stages else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
    )
    return render(
        "training/card.md.jinja",
        metadata=metadata.to_yaml(),
        name=name,
        version=tuna_peft.__version__,
        base=base or "unknown",
        stages=stages,
        dataset=dataset,
        settings={key: str(getattr(trainer.args, key)) for key in _SETTINGS},
        metrics={key: f"{evaluations[-1][key]:.4g}" for key in wanted if evaluations and key in evaluations[-1]},
    )
