"""Loads a stack of adapters onto its base, and saves it with its manifest (`stack.json`).

`AdapterStack` is public; runs and checkpoints write with `write_stack` and `extend_stack`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuna_peft.data.texts import set_template_date
from tuna_peft.errors import UserError
from tuna_peft.files import atomic_directory
from tuna_peft.models.base.load import Base, base_identity, load_base, resolve_device, resolve_dtype
from tuna_peft.models.stack.adapters import adapter_names, load_adapter, save_adapter
from tuna_peft.models.stack.find import find_stack
from tuna_peft.models.stack.manifest import AdapterEntry, Manifest, read_manifest


@dataclass
class AdapterStack:
    """A base with its frozen adapters, all active.

    Attributes:
        model: A `PeftModel`, in evaluation mode (the bare base for an empty stack).
        tokenizer: The base's tokenizer.
        prompt: The prompt template of training, as in the manifest.
        load_dtype: The dtype in which training loaded the base, as in the manifest; None for the present one.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompt: dict[str, Any] = field(default_factory=dict)
    load_dtype: str | None = None

    def __post_init__(self) -> None:
        set_template_date(self.tokenizer, self.prompt.get("date"))  # generation shows the date of training

    @property
    def names(self) -> list[str]:
        """Adapter names from bottom to top."""
        return adapter_names(self.model)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        upto: str | None = None,
        base: Base | None = None,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> AdapterStack:
        """Loads a stack onto the base and the quantization that it was trained with, and verifies both.

        Args:
            folder: The folder with `stack.json`, a run's folder, or a Hub id.
            revision: Branch, tag or commit of a stack on the Hub.
            upto: Load the stack up to this adapter.
            base: An already loaded base; by default the manifest's is loaded.
            base_model: Path or Hub id of that base, if it has moved.
            device, trust_remote_code: See `load_base`.
            dtype: `auto` depends on the device, see `resolve_dtype`; the manifest's `load_dtype` is not used here.

        Raises:
            UserError: An adapter is broken, changed or without its stack; or base or quantization differ from those of
                training.
        """
        folder = find_stack(folder, revision)
        manifest = read_manifest(folder, upto)
        if base is None:
            compute = resolve_dtype(dtype, resolve_device(device))
            settings = manifest.quantization
            try:
                base = load_base(
                    base_model or manifest.base["model"],
                    revision=None if base_model else manifest.base["revision"],
                    quantization_config=settings and BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=compute),
                    device=device,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                )
            except UserError as error:
                moved = "If the base of this stack has moved, pass its new path or Hub id (base_model)."
                fix = f"{error.fix} {moved}" if error.fix else moved
                raise UserError(error.what, where=error.where, fix=fix) from error
        require_same_base(base.identity, manifest.base, str(folder))
        _require_same_quantization(quantization_of(base.model), manifest.quantization, str(folder))
        model: PreTrainedModel | PeftModel = base.model
        for entry in manifest.adapters:
            model = load_adapter(model, entry.name, folder / entry.path)
        return cls(model, base.tokenizer, manifest.prompt, manifest.load_dtype)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the stack, see `save_stack`."""
        if not isinstance(self.model, PeftModel):
            raise UserError("the stack has no adapters to save", where=str(folder))
        save_stack(self.model, folder, self.prompt, self.load_dtype)


def save_stack(
    model: PeftModel,
    folder: str | os.PathLike[str],
    prompt: dict[str, Any] | None = None,
    load_dtype: str | None = None,
) -> None:
    """Atomically replaces `folder` by the whole stack, see `write_stack`."""
    with atomic_directory(folder) as aside:
        write_stack(model, aside, prompt, load_dtype)


def write_stack(
    model: PeftModel, folder: Path, prompt: dict[str, Any] | None = None, load_dtype: str | None = None
) -> None:
    """Writes every adapter to `folder/<name>/` and then the manifest to `folder/stack.json`."""
    for name in adapter_names(model):
        save_adapter(model, name, folder / name)
    _manifest_of(model, folder, prompt, load_dtype).write(folder)


def extend_stack(model: PeftModel, folder: Path, prompt: dict[str, Any] | None = None) -> None:
    """Adds the top adapter of `model` to the stack in `folder`; the lower adapters on disk are not written again.

    The adapter's folder is written atomically, then the manifest that lists it.
    """
    top = adapter_names(model)[-1]
    with atomic_directory(folder / top) as aside:
        save_adapter(model, top, aside)
    _manifest_of(model, folder, prompt).write(folder)


def _manifest_of(
    model: PeftModel, folder: Path, prompt: dict[str, Any] | None, load_dtype: str | None = None
) -> Manifest:
    base = cast(PreTrainedModel, model.get_base_model())
    return Manifest(
        base_identity(base),
        quantization_of(base),
        [AdapterEntry.of(folder, name) for name in adapter_names(model)],
        prompt or {},
        # The configuration's dtype, because trainers may cast parameters after loading.
        load_dtype=load_dtype or str(base.config.dtype or base.dtype).removeprefix("torch."),
    )


def quantization_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The bitsandbytes settings of a loaded model that change its weights; None when it is not quantized.

    Raises:
        UserError: Another library quantized it.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    if not isinstance(config, BitsAndBytesConfig):
        raise UserError(
            f"the base is quantized by {type(config).__name__}",
            fix="Use a base quantized by bitsandbytes (nf4, fp4, int8) or an unquantized one.",
        )
    if config.load_in_8bit:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
    }


def quantization_method(settings: dict[str, Any] | None) -> str:
    """The recipe's name for the result of `quantization_of`: `nf4`, `fp4`, `int8` or `none`."""
    return "none" if settings is None else str(settings.get("bnb_4bit_quant_type", "int8"))


def require_same_base(loaded: dict[str, Any], trained: dict[str, Any], where: str) -> None:
    """Compares two base identities by the hashes of their weights, or by name where a hash is missing.

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


def _require_same_quantization(loaded: dict[str, Any] | None, trained: dict[str, Any] | None, where: str) -> None:
    if loaded != trained:
        raise UserError(
            f"this stack was trained on a base with {_described(trained)}; the one given has {_described(loaded)}",
            where=where,
            fix="Load the base with that quantization, or pass none: the manifest says how to load it.",
        )


def _described(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return "no quantization"
    return "quantization " + ", ".join(f"{key}={value}" for key, value in quantization.items())
