"""A model's `config.json`: from a folder, the Hub, the Hub's cache, or, offline, from the sizes in `shapes.KNOWN`."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from tuna_peft.errors import UserError
from tuna_peft.json_text import read_json
from tuna_peft.models.base.hub_files import hub_file
from tuna_peft.planning.shapes import ModelShape, known_shape

logger = logging.getLogger("tuna_peft")


def read_shape(model: str, revision: str | None = None) -> tuple[ModelShape, str]:
    """The shape of a model, and where it was read, in words.

    Args:
        model: Hub id, local path, or `builtin:` name.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: There is no such model, it is gated, it cannot be reached, or its layout is unknown.
    """
    if model.startswith("builtin:"):
        folder = Path(str(resources.files("tuna_peft.assets"))) / model.removeprefix("builtin:").replace("-", "_")
        return _read(folder / "config.json", model), "its config.json"
    if Path(model).is_dir():
        return _read(Path(model) / "config.json", model), "its config.json"
    try:
        file, source = hub_file(model, "config.json", revision)
    except UserError as error:
        if (shape := known_shape(model)) is None:
            raise
        if isinstance(error.__cause__, RepositoryNotFoundError):  # also for gated models
            logger.warning("a run will stop here: %s", error)
        return shape, "the table of known models (its config.json could not be read)"
    return _read(file, model), source


def is_on_disk(model: str, revision: str | None = None) -> bool:
    """Whether all weights are on this machine: in a folder, in the package, or in the Hub's cache."""
    if model.startswith("builtin:") or Path(model).is_dir():
        return True

    def cached(name: str) -> str | None:
        try:
            found = try_to_load_from_cache(model, name, revision=revision)
        except HFValidationError:
            return None
        return found if isinstance(found, str) else None

    if (index := cached("model.safetensors.index.json")) is None:
        return cached("model.safetensors") is not None
    shards = set(read_json(index)["weight_map"].values())
    return all(cached(shard) is not None for shard in shards)


def _read(file: Path, model: str) -> ModelShape:
    config = read_json(file, "config.json of a model", "Check `base.model`, or download the model again.")
    return ModelShape.from_config(config, model)
