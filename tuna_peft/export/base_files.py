"""Finds the base's files, and copies those besides weights. `merge`, `gguf` and `release` use it."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.export.chat_template import chat_template_of
from tuna_peft.files import write_json, write_text
from tuna_peft.json_text import read_json
from tuna_peft.models.base.load import require_unquantized, resolve_model_path
from tuna_peft.models.base.stored_weights import safetensors_files, weights_fingerprint
from tuna_peft.models.stack.files import require_same_base
from tuna_peft.models.stack.manifest import Manifest

# Configuration, generation settings, tokenizer, chat template, custom code, licences: everything but weights.
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_WEIGHT_INDICES = "*.index.json"
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*.jinja", "chat_template.json"),
)

logger = logging.getLogger("tuna_peft")


def locate_base(manifest: Manifest, base_model: str | None, where: str | os.PathLike[str]) -> Path:
    """The local folder of the base that a stack was trained on; a Hub model is downloaded or found in the cache.

    Args:
        manifest: The stack's manifest.
        base_model: Path or Hub id of the base, if it has moved.
        where: The stack, for messages.

    Raises:
        UserError: No such model, no unquantised safetensors weights, or not the model that the manifest names.
    """
    model = base_model or manifest.base["model"]
    revision = None if base_model else manifest.base["revision"]
    folder = model_folder(model, revision, where)
    files = safetensors_files(str(folder))
    if not files:
        raise UserError("the base has no safetensors weights", where=model, fix="Convert it: pickles are not read.")
    require_unquantized(PretrainedConfig.from_dict(read_config(folder)), model)
    loaded = {"model": model, "revision": revision, "fingerprint": weights_fingerprint(files)}
    require_same_base(loaded, manifest.base, str(where))
    return folder


def model_folder(model: str, revision: str | None, where: str | os.PathLike[str]) -> Path:
    """The local folder of a base with its files; a Hub model is downloaded or found in the cache.

    Args:
        model: A folder, a Hub id, or a `builtin:` name.
        revision: Branch, tag or commit of a Hub model.
        where: What asks for it, for messages.

    Raises:
        UserError: No such model.
    """
    folder = Path(resolve_model_path(model))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*_COMPANIONS, "model*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot find the base model {model!r}: {str(error).splitlines()[0]}",
            where=str(where),
            fix="If it has moved, pass its path or Hub id (base_model).",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json` as it is stored."""
    return read_json(folder / "config.json", "configuration of a model")


def companion_files(folder: Path) -> list[Path]:
    """All files but weights: configuration, tokenizer, templates, licenses."""
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - set(folder.glob(_WEIGHT_INDICES)))


def copy_companions(
    folder: Path, out: Path, changes: dict[str, Any], prompt: dict[str, Any], *, trust_remote_code: bool = False
) -> None:
    """Copies the base's companion files unchanged, except for three things.

    `changes` go into `config.json`; the training prompt becomes the chat template; EOS, which ended each training
    response, is added to the tokens at which generation stops.

    Args:
        prompt: The manifest's prompt template, which becomes the chat template, see `chat_template_of`.
    """
    for path in companion_files(folder):
        shutil.copyfile(path, out / path.name)
    config = read_config(folder)
    config.pop("torch_dtype", None)  # the name of `dtype` before transformers 5
    write_json(out / "config.json", {**config, **changes})
    if any(out.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        _stop_at(tokenizer.eos_token_id, out)
        _set_chat_template(out, tokenizer, prompt)


def copy_tokenizer(manifest: Manifest, base_model: str | None, out: Path) -> None:
    """Copies the base's tokenizer, with the training prompt as its chat template, beside adapters.

    Weights are not needed. Where the base is not found, a warning says so, and nothing is copied.

    Args:
        manifest: The stack's manifest.
        base_model: Path or Hub id of the base, if it has moved.
        out: An existing folder.
    """
    model = base_model or manifest.base["model"]
    folder = Path(resolve_model_path(model))
    try:
        if not folder.is_dir():
            revision = None if base_model else manifest.base["revision"]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*_TOKENIZER, "config.json"]))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer beside the adapter, because that of %s was not found: %s", model, error)
        return
    for path in sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, out / path.name)
    _set_chat_template(out, tokenizer, manifest.prompt)


def _stop_at(eos: int, out: Path) -> None:
    file = out / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    # Without this file, transformers reads the model's configuration.
    known = settings.get("eos_token_id", None if settings else read_config(out).get("eos_token_id"))
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if eos not in ids:
        write_json(file, {**settings, "eos_token_id": [*ids, eos]})


def _set_chat_template(out: Path, tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any]) -> None:
    """Replaces the chat template beside a tokenizer by the training prompt, if that is another one."""
    template = chat_template_of(prompt, tokenizer)
    if template is None:
        return
    write_text(out / "chat_template.jinja", template)
    # Older places of the template, which would contradict the new one.
    (out / "chat_template.json").unlink(missing_ok=True)
    config = out / "tokenizer_config.json"
    if config.is_file():
        settings = read_json(config)
        if settings.pop("chat_template", None) is not None:
            write_json(config, settings)
