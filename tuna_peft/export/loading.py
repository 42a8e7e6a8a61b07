"""How to load a run's exports, nearest to the unmerged adapters first, for a run's last lines and for the card.

Imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuna_peft.json_text import read_json
from tuna_peft.models.stack.manifest import MANIFEST

# In a run's exports, beside what it wrote: the base, and a combined adapter on a base that is not quantized.
BASE = "base without adapters"
UNQUANTIZED = " on the unquantized base"
ON_UNQUANTIZED = f"combined{UNQUANTIZED}"


@dataclass(frozen=True)
class Loading:
    """One way to load a run's result.

    Attributes:
        what: What it loads, in words.
        code: An expression of Python, or a command.
        kl: Its mean KL divergence from the unmerged adapters in nats; None if the run did not measure it.
    """

    what: str
    code: str
    kl: float | None


def quantization_arguments(stack: dict[str, Any]) -> str:
    """The arguments of `BitsAndBytesConfig` with which the base is as in training.

    Args:
        stack: The content of `stack.json`, of a quantized base.
    """
    settings = dict(stack["quantization"])
    if settings.get("load_in_4bit") and stack.get("load_dtype"):
        settings["bnb_4bit_compute_dtype"] = stack["load_dtype"]
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def mean_kl(exports: dict[str, Any] | None, name: str) -> float | None:
    """The measured distance of one of a run's exports; None if there is none."""
    export = (exports or {}).get(name)
    measured = export.get("divergence") if isinstance(export, dict) else None
    return measured["kl_mean"] if measured else None


def nearest_export(exports: dict[str, Any] | None) -> tuple[str, float] | None:
    """The export with the smallest distance that the run measured, in words, and that distance in nats."""
    measured = {name: kl for name in exports or {} if name != BASE and (kl := mean_kl(exports, name)) is not None}
    if not measured:
        return None
    name = min(measured, key=lambda name: measured[name])
    words = {
        "combined": "the combined adapter on the base as in training",
        ON_UNQUANTIZED: "the combined adapter on the base without quantization",
        "merged": "the merged model",
    }
    return words.get(name, name), measured[name]


def ways_to_load(folder: Path, exports: dict[str, Any]) -> list[Loading]:
    """The ways to load what a run wrote, the nearest first, then those that were not measured.

    Args:
        folder: The run's folder.
        exports: `exports` of the run's report.
    """
    found = []
    if (folder / "combined").is_dir():
        stack = read_json(folder / "stack" / MANIFEST)
        path = json.dumps(str(folder / "combined"))
        if stack["base"]["model"].startswith("builtin:"):  # PEFT knows none
            call, what = f"AdapterStack.from_pretrained({json.dumps(str(folder))})", "the adapters, with tuna_peft"
        elif stack["quantization"] is None:
            call, what = f"AutoPeftModelForCausalLM.from_pretrained({path})", "the adapter, with PEFT"
        else:
            settings = f"BitsAndBytesConfig({quantization_arguments(stack)})"
            call = f"AutoPeftModelForCausalLM.from_pretrained({path}, quantization_config={settings})"
            what = "the adapter on the base as quantized in training, with PEFT"
        found.append(Loading(what, call, mean_kl(exports, "combined")))
    if (folder / "merged").is_dir():
        call = f"AutoModelForCausalLM.from_pretrained({json.dumps(str(folder / 'merged'))})"
        found.append(Loading("the merged model, with transformers", call, mean_kl(exports, "merged")))
    for file in sorted((folder / "gguf").glob("*.gguf")):
        found.append(Loading("GGUF, with llama.cpp", f"llama-cli -m {file}", mean_kl(exports, f"gguf/{file.name}")))
    return sorted(found, key=lambda way: math.inf if way.kl is None else way.kl)
