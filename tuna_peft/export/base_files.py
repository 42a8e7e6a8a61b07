"""The base's own files: where they are, and those that a merged model takes along."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from tuna_peft.errors import UserError
from tuna_peft.files import write_json
from tuna_peft.models.adapter_stack import require_same_base
from tuna_peft.models.base import resolve_model_path, safetensors_files, weights_fingerprint
from tuna_peft.models.manifest import Manifest

# Configuration, generation settings, tokenizer, chat template, custom code, licences: everything but weights.
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_WEIGHT_INDICES = "*.index.json"


def locate_base(manifest: Manifest, base_model: str | None, where: str | os.PathLike[str]) -> Path:
    """The local folder of the base that a stack was trained on; a Hub model is downloaded or found in the cache.

    Args:
        manifest: The stack's manifest.
        base_model: Where that base is now, if it has moved.
        where: The stack, for messages.

    Raises:
        UserError: No such model, no unquantised safetensors weights, or another model than that of the manifest.
    """
    model = base_model or manifest.base["model"]
    revision = None if base_model else manifest.base["revision"]
    folder = Path(resolve_model_path(model))
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(model, revision=revision, allow_patterns=[*_COMPANIONS, "model*.safetensors"])
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot find the base model {model!r}: {str(error).splitlines()[0]}",
                where=str(where),
                fix="If it has moved, say where it is now (base_model).",
            ) from error
    files = safetensors_files(str(folder))
    if not files:
        raise UserError("the base has no safetensors weights", where=model, fix="Convert it: pickles are not read.")
    if "quantization_config" in read_config(folder):
        raise UserError(
            "the stored weights of the base are already quantised",
            where=model,
            fix="Merge into the 16-bit model they were made from (base_model).",
        )
    loaded = {"model": model, "revision": revision, "fingerprint": weights_fingerprint(files)}
    require_same_base(loaded, manifest.base, str(where))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json` as it is stored."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def companion_files(folder: Path) -> list[Path]:
    """The files that are no weights: configuration, tokenizer, templates, licences."""
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - set(folder.glob(_WEIGHT_INDICES)))


def copy_companions(folder: Path, out: Path, dtype: str) -> None:
    """Copies the base's companion files as they are, but for the dtype in `config.json`.

    This is where a chat template that repeats the training prompt will be added.
    """
    for path in companion_files(folder):
        shutil.copyfile(path, out / path.name)
    config = read_config(folder)
    config.pop("torch_dtype", None)  # the name of `dtype` before transformers 5
    write_json(out / "config.json", {**config, "dtype": dtype})
