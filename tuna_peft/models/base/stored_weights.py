"""The stored weights of a base: which files hold them, a fingerprint, and whether they are all there.

Used by `load`, by the checks before a run, and by exports, which read the files again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from tuna_peft.errors import UserError
from tuna_peft.files import unreadable_is_a_user_error

SAME_MODEL = "Its config.json and its weights must be of the same model, and downloaded in full."


def require_readable_weights(path: str, revision: str | None = None) -> None:
    """Checks, by their headers, that the weight files of a local or cached base are all there and whole.

    Args:
        path: A folder, or a Hub id, of which only the files in the cache are checked: loading downloads the others.

    Raises:
        UserError: A file is missing, cut off, or something else; or a folder has no safetensors at all.
    """
    files, is_folder = safetensors_files(path, revision), Path(path).is_dir()
    if is_folder and not files:
        pickled = sorted(file.name for file in Path(path).glob("*.bin"))
        raise UserError(
            "the folder has no weights in safetensors" + (f", only {pickled[0]}" if pickled else ""),
            where=path,
            fix="Save it again with transformers' `save_pretrained`: files of pickle can run code and are not read."
            if pickled
            else "Download the model's *.safetensors into it.",
        )
    for file in files:
        if is_folder or Path(file).exists():
            with _weights(file):
                pass


def require_all_weights(model: PreTrainedModel, missing: Collection[str], name: str) -> None:
    """Checks a model that has just been loaded: no weight was missing, and every quantized one has its layer's shape.

    transformers fills missing weights with random numbers and goes on, and does not compare the shapes of weights
    that it quantizes.

    Args:
        missing: `missing_keys` of transformers' loading info.
        name: The model's name, for the error.

    Raises:
        UserError: A weight is missing, or has another shape.
    """
    if missing:
        first = sorted(missing)[0]
        others = f" and {len(missing) - 1:,} more weights" if len(missing) > 1 else ""
        raise UserError(f"the stored weights lack {first}{others}", where=name, fix=SAME_MODEL)
    for layer, module in model.named_modules():
        if not isinstance(module, (Linear4bit, Linear8bitLt)):
            continue
        state = getattr(module.weight, "quant_state", None)
        shape = tuple(state.shape if state is not None else module.weight.shape)
        expected = module.out_features, module.in_features
        if shape != expected:
            what = f"the stored weight of {layer} has shape {shape}, and config.json says {expected}"
            raise UserError(what, where=name, fix=SAME_MODEL)


def weights_fingerprint(files: list[str]) -> str | None:
    """SHA-256 over the first row of every tensor in the safetensors files, before any quantization or cast.

    A fine-tune or a merge changes those rows. Reading them takes milliseconds; hashing every byte of a 7B model takes
    a minute. None when there are no files.
    """
    if not files:
        return None
    digest = hashlib.sha256()
    rows: dict[str, bytes] = {}
    for file in files:
        with _weights(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                view = tensors.get_slice(name)
                row = view[0:1] if view.get_shape() else tensors.get_tensor(name)
                shape = str(tuple(view.get_shape())).encode()
                rows[name] = shape + row.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    for name in sorted(rows):
        digest.update(name.encode() + rows[name])
    return digest.hexdigest()


def safetensors_files(path: str, revision: str | None = None) -> list[str]:
    """The weight files of a local or cached model, sorted by name; empty when it has no safetensors."""

    def find(name: str) -> str | None:
        return cached_file(
            path,
            name,
            revision=revision,
            local_files_only=not Path(path).is_dir(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )

    if single := find("model.safetensors"):
        return [single]
    if index := find("model.safetensors.index.json"):
        with unreadable_is_a_user_error(index, "an index of weights"):
            shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [str(Path(index).parent / shard) for shard in shards]
    return []


@contextlib.contextmanager
def _weights(file: str) -> Iterator[Any]:
    """An open safetensors file; whatever safetensors raises meanwhile is a UserError."""
    if not Path(file).is_file():
        raise UserError("the index of the weights names this file, and it is missing", where=file, fix="Download it.")
    with unreadable_is_a_user_error(file, "weights of a model"), safe_open(file, framework="pt") as tensors:
        yield tensors
