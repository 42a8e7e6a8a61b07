"""Teachers and judges that run here, for a plan: read off their configuration, without weights."""

from __future__ import annotations

from pathlib import Path

from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import JudgeSettings, ScoreSettings
from tuna_peft.models.stack.any_model import local_stack
from tuna_peft.models.stack.files import quantization_method
from tuna_peft.models.stack.manifest import read_manifest
from tuna_peft.planning.hub_config import is_on_disk, read_shape
from tuna_peft.planning.memory import Precision
from tuna_peft.planning.spec import Device, LocalModel


def local_model(settings: ScoreSettings | JudgeSettings, device: Device, key: str) -> LocalModel | None:
    """The model that the settings name; None where a server or a program ranks.

    Args:
        key: Of the settings in the recipe, for errors.

    Raises:
        UserError: There is no such model, it cannot be reached, or its layout is unknown; names the key.
    """
    if settings.model is None:
        return None
    name, revision = settings.model, settings.revision
    method: str = settings.quantization
    double, adapters = True, 0
    try:
        if (stack := local_stack(name)) is not None:
            manifest = read_manifest(stack)
            name, revision = manifest.base["model"], manifest.base["revision"]
            method = quantization_method(manifest.quantization)
            double = (manifest.quantization or {}).get("bnb_4bit_use_double_quant", True)
            adapters = sum(_parameters(stack / entry.path) for entry in manifest.adapters)
        shape, _ = read_shape(name, revision)
    except UserError as error:
        raise type(error)(error.what, where=f"{key}.model ({settings.model})", fix=error.fix) from error
    precision = Precision(method, double, 2 if device.cuda else 4, flash=device.bf16 and device.cuda)
    return LocalModel(settings.model, shape, precision, adapters, downloads=not is_on_disk(name, revision))


def _parameters(folder: Path) -> int:
    """Of an adapter, which is kept in fp32."""
    return (folder / "adapter_model.safetensors").stat().st_size // 4
