"""The metadata of a base's model card, if the card is on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from tuna_peft.models.base.load import resolve_model_path

_BUILTIN = {"license": "apache-2.0", "language": "en"}


def base_card(model: str, revision: str | None) -> dict[str, Any]:
    """The metadata of a model card in the model's folder or in the Hub's cache; empty without a card."""
    if model.startswith("builtin:"):
        return dict(_BUILTIN)
    folder = Path(resolve_model_path(model))
    cached = None if folder.is_dir() else try_to_load_from_cache(model, "README.md", revision=revision)
    for file in (Path(cached) if isinstance(cached, str) else None, folder / "README.md"):
        if file is not None and file.is_file():
            return ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    return {}
