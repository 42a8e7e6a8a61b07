"""The `general.*` keys of a GGUF file, as llama.cpp's own converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import Metadata, size_label

from tuna_peft.export.base_card import base_card
from tuna_peft.export.release import is_local


def general_metadata(name: str, stack: Mapping[str, Any], folder: Path | None, parameters: int) -> Metadata:
    """Name, size, license, languages and base of a model or an adapter.

    Args:
        name: The model's name.
        stack: The manifest of the adapters that were merged or are written; empty for a plain model.
        folder: The folder of a plain model.
        parameters: Number of parameters in the file.
    """
    base, revision = (stack["base"]["model"], stack["base"]["revision"]) if stack else (str(folder), None)
    card = {key: value for key, value in base_card(base, revision).items() if key in ("license", "language")}
    if isinstance(card.get("license"), list):
        card["license"] = ",".join(card["license"])
    if stack and "/" in base and not is_local(base):
        card["base_model"] = base
    found = Metadata.apply_metadata_heuristic(Metadata(name=name), card)
    found.size_label = size_label(parameters, 0, 0, 0)
    return found
