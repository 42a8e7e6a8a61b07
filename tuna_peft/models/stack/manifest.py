"""`stack.json`, the manifest of a stack: everything needed to load its adapters, and hashes that show any change."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import tuna_peft
from tuna_peft.data.config import PromptConfig
from tuna_peft.errors import UserError
from tuna_peft.files import sha256, write_json
from tuna_peft.json_text import read_json

MANIFEST = "stack.json"
FORMAT = 1

# The configuration is hashed too: another lora_alpha makes another adapter.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "load_in_8bit": (True,),
    "load_in_4bit": (True,),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
}


@dataclass
class AdapterEntry:
    """One adapter: its name, its folder relative to the manifest, the SHA-256 of each of its files."""

    name: str
    path: str
    sha256: dict[str, str]

    @classmethod
    def of(cls, root: Path, name: str) -> AdapterEntry:
        """The entry of the adapter in `root/name`."""
        return cls(name, name, {file: sha256(root / name / file) for file in ADAPTER_FILES})


@dataclass
class Manifest:
    """The contents of `stack.json`.

    Attributes:
        base: `{"model", "revision", "fingerprint"}` of the base that the adapters were trained on.
        quantization: bitsandbytes settings of that base as keyword arguments, or None for an unquantised one.
        adapters: From the bottom of the stack to its top.
        prompt: The prompt template of training: `{"template", ...}`; empty when unknown.
        load_dtype: The dtype in which the base was loaded, before quantization; None when unknown.
    """

    base: dict[str, Any]
    quantization: dict[str, Any] | None
    adapters: list[AdapterEntry]
    prompt: dict[str, Any] = field(default_factory=dict)
    load_dtype: str | None = None
    format: int = FORMAT
    written_by: str = f"tuna_peft {tuna_peft.__version__}"

    def write(self, folder: Path) -> None:
        """Writes `folder/stack.json`."""
        write_json(folder / MANIFEST, asdict(self))


def read_manifest(folder: str | os.PathLike[str], upto: str | None = None) -> Manifest:
    """Reads and verifies `folder/stack.json`: its format, that paths stay inside, and the hashes of all adapters.

    Args:
        folder: The folder that holds `stack.json`.
        upto: Keep the stack up to this adapter only.

    Raises:
        UserError: There is no manifest (a single adapter gets a message of its own), its format is unknown, or an
            adapter is missing or changed.
    """
    root = Path(folder)
    file = root / MANIFEST
    if not file.is_file():
        raise _no_manifest(root)
    raw = read_json(file, "stack manifest", "Copy the stack again.")
    try:
        if isinstance(raw.get("format"), bool) or raw.get("format") != FORMAT:
            raise UserError(
                f"stack format {raw.get('format')!r}, this version reads {FORMAT}",
                where=str(file),
                fix="Install the version of tuna_peft that wrote it: " + str(raw.get("written_by")),
            )
        manifest = Manifest(**{**raw, "adapters": [AdapterEntry(**entry) for entry in raw["adapters"]]})
        _require_complete(manifest)
    except (ValidationError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"not a valid stack manifest: {_reason(error)}", where=str(file), fix="Copy the stack again."
        ) from error
    if upto is not None:
        names = [entry.name for entry in manifest.adapters]
        if upto not in names:
            raise UserError(f"the stack has no adapter {upto!r}", where=str(file), fix=f"It has: {', '.join(names)}.")
        manifest.adapters = manifest.adapters[: names.index(upto) + 1]
    for entry in manifest.adapters:
        _verify(root, entry)
    return manifest


def refuse_begun_run(folder: Path) -> None:
    """Raises UserError for the folder of a run that has not finished a stage yet."""
    if (folder / "recipe.yaml").is_file():
        raise UserError(
            "no stage of this run has ended yet",
            where=str(folder),
            fix="Resume it: run the same `tuna-peft run` command again.",
        )


def _no_manifest(root: Path) -> UserError:
    refuse_begun_run(root)
    if not (root / "adapter_config.json").is_file():
        return UserError(
            "no stack.json here",
            where=str(root),
            fix="Give a run's folder, the folder that holds stack.json, or a Hub id.",
        )
    fix = "Give the folder that holds stack.json; a lone upper adapter is useless without the ones below it."
    if (root.parent / MANIFEST).is_file():
        fix = f"Its stack is {root.parent}: load that, up to {root.name!r}."
    return UserError("this is a lone adapter: nothing says which adapters it was trained on", where=str(root), fix=fix)


def _require_complete(manifest: Manifest) -> None:
    for entry in manifest.adapters:
        texts = (entry.name, entry.path, *map(entry.sha256.get, ADAPTER_FILES))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"adapter {entry.name!r} needs a name, a path, and a hash of each of its files")
    if len({entry.name for entry in manifest.adapters}) < len(manifest.adapters):
        raise TypeError("two adapters have one name")
    base, quantization = manifest.base, manifest.quantization
    if missing := {"model", "revision", "fingerprint"} - set(base):
        raise KeyError(f"base.{min(missing)}")
    if not isinstance(base["model"], str | None) or not isinstance(base["revision"], str | None):
        raise TypeError("the base needs a name, and a revision or null")
    if not isinstance(base["fingerprint"], str | None):
        raise TypeError("the fingerprint of the base is text or null")
    if quantization is not None and any(value not in _QUANTIZATION[key] for key, value in quantization.items()):
        raise TypeError(f"unknown quantization {quantization!r:.200}")
    if manifest.load_dtype not in (None, "float32", "float16", "bfloat16"):
        raise TypeError(f"unknown dtype {manifest.load_dtype!r:.40}")
    if manifest.prompt != {}:
        PromptConfig.model_validate(manifest.prompt)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return f"prompt: {error.errors()[0]['msg']}"
    return f"{error.args[0]} is missing or unknown" if isinstance(error, KeyError) else str(error)


def _verify(root: Path, entry: AdapterEntry) -> None:
    # Resolve links first: one inside the folder can point outside, as `..` can.
    if not (root / entry.path).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"the path {entry.path!r} leaves the stack's folder",
            where=str(root / MANIFEST),
            fix="Do not load this stack; get it again from a source you trust.",
        )
    for name in ADAPTER_FILES:
        file = root / entry.path / name
        if not file.is_file():
            raise UserError(f"adapter {entry.name!r} is missing", where=str(file), fix="Copy the whole stack folder.")
        if sha256(file) != entry.sha256[name]:
            raise UserError(
                f"adapter {entry.name!r} is not the one that was trained: its hash differs from stack.json",
                where=str(file),
                fix="Copy the stack again, or train the stages above this one again.",
            )
