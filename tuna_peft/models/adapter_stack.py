"""A stack of adapters as one object: load it onto its base, save it with its manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.files import atomic_directory
from tuna_peft.models.base import Base, base_identity, load_base, resolve_device, resolve_dtype
from tuna_peft.models.manifest import AdapterEntry, Manifest, read_manifest
from tuna_peft.models.stack import adapter_names, load_adapter, save_adapter


@dataclass
class AdapterStack:
    """A base with its frozen adapters, all active.

    Attributes:
        model: A `PeftModel`, in evaluation mode (the bare base for an empty stack).
        tokenizer: The base's tokenizer.
        prompt: The prompt template of training, as in the manifest.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompt: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Adapter names from bottom to top."""
        return adapter_names(self.model)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        upto: str | None = None,
        base: Base | None = None,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> AdapterStack:
        """Loads a stack onto the base and the quantisation it was trained with, and verifies both.

        Args:
            folder: The folder with `stack.json`.
            upto: Load the stack up to this adapter.
            base: An already loaded base; by default the manifest's is loaded.
            base_model: Where that base is now, if it has moved.

        Raises:
            UserError: A broken or lone adapter, changed weights, or another base than the one of training.
        """
        manifest = read_manifest(folder, upto)
        if base is None:
            base = load_base(
                base_model or manifest.base["model"],
                revision=None if base_model else manifest.base["revision"],
                quantization_config=_quantization_from(
                    manifest.quantization, resolve_dtype(dtype, resolve_device(device))
                ),
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
        require_same_base(base.identity, manifest.base, str(folder))
        model: PreTrainedModel | PeftModel = base.model
        for entry in manifest.adapters:
            model = load_adapter(model, entry.name, Path(folder) / entry.path)
        return cls(model, base.tokenizer, manifest.prompt)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the stack, see `save_stack`."""
        if not isinstance(self.model, PeftModel):
            raise UserError("the stack has no adapters to save", where=str(folder))
        save_stack(self.model, folder, self.prompt)


def save_stack(model: PeftModel, folder: str | os.PathLike[str], prompt: dict[str, Any] | None = None) -> None:
    """Replaces `folder` by the whole stack, all at once, see `write_stack`."""
    with atomic_directory(folder) as aside:
        write_stack(model, aside, prompt)


def write_stack(model: PeftModel, folder: Path, prompt: dict[str, Any] | None = None) -> None:
    """Writes every adapter to `folder/<name>/` and then the manifest to `folder/stack.json`."""
    base = cast(PreTrainedModel, model.get_base_model())
    identity = base_identity(base)
    entries = []
    for name in adapter_names(model):
        save_adapter(model, name, folder / name, base_model=identity["model"])
        entries.append(AdapterEntry.of(folder, name))
    Manifest(identity, quantization_of(base), entries, prompt or {}).write(folder)


def extend_stack(model: PeftModel, folder: Path, prompt: dict[str, Any] | None = None) -> None:
    """Adds the top adapter of `model` to the stack in `folder`, whose lower adapters stay untouched on disk.

    The adapter's folder appears at once, and then the manifest that names it.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    identity, names = base_identity(base), adapter_names(model)
    with atomic_directory(folder / names[-1]) as aside:
        save_adapter(model, names[-1], aside, base_model=identity["model"])
    entries = [AdapterEntry.of(folder, name) for name in names]
    Manifest(identity, quantization_of(base), entries, prompt or {}).write(folder)


def quantization_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The bitsandbytes settings of a loaded model that change its weights; None when it is not quantised."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    if not isinstance(config, BitsAndBytesConfig):
        raise UserError(
            f"the base is quantised by {type(config).__name__}",
            fix="Stacks are built on bitsandbytes (nf4, fp4, int8) or unquantised bases.",
        )
    if config.load_in_8bit:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
    }


def _quantization_from(settings: dict[str, Any] | None, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    return None if settings is None else BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=compute_dtype)


def require_same_base(loaded: dict[str, Any], trained: dict[str, Any], where: str) -> None:
    """Compares two base identities by the digests of their weights, or by name where a digest is missing.

    Raises:
        UserError: They differ.
    """
    if loaded["fingerprint"] and trained["fingerprint"]:
        same = loaded["fingerprint"] == trained["fingerprint"]
    else:
        same = loaded["model"] == trained["model"]
    if not same:
        raise UserError(
            f"this stack was trained on {trained['model']!r} (revision {trained['revision']}), "
            f"not on {loaded['model']!r} (revision {loaded['revision']}): the stored weights differ",
            where=where,
            fix="Load it on the base it was trained on.",
        )
