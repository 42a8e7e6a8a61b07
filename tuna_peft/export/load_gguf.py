"""Loads a GGUF file as a transformers model, to measure it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig

from tuna_peft.errors import UserError


def gguf_files(path: Path) -> list[Path]:
    """The models among the GGUF files of a folder, or the file itself; empty for a folder without any.

    Raises:
        UserError: All of them are adapters.
    """
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    models = [file for file in files if "-LORA-" not in file.name]
    if files and not models:
        raise UserError(
            "a GGUF adapter cannot be measured without llama.cpp",
            where=str(path),
            fix="Measure the stack's merged model as GGUF, or the combined adapter.",
        )
    return models


def load_gguf(path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Dequantizes a GGUF file into a model.

    Args:
        path: The file.
        config: The base's configuration: transformers reads neither RoPE scaling nor biases from the file.
        dtype: Dtype of weights and computation.
        device: Device of the model; main memory if the GPU is too small.

    Raises:
        UserError: transformers cannot read the file.
    """
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    # Mistral is LLaMA with a window, which llama.cpp does not have; transformers' loader does not know its name.
    kind = type(config)
    if config.model_type == "mistral":
        kind, settings["model_type"] = LlamaConfig, "llama"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=kind.from_dict(settings),
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, NotImplementedError, struct.error) as error:  # an unknown format or architecture
        raise UserError(f"transformers cannot read it: {str(error).splitlines()[0]}", where=str(path)) from error
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(weight.nbytes for weight in model.parameters()) > 0.9 * free:
            return model.eval()
    return model.to(device).eval()
