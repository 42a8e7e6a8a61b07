"""Loads the frozen base: any causal LM, quantized by bitsandbytes or not, with its tokenizer.

Used by runs, stacks, local judges and teachers, exports, and by `TunaTrainer` for a model given by name.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tuna_peft.errors import UserError, first_line
from tuna_peft.files import wrong_content
from tuna_peft.limits import is_ampere_or_later
from tuna_peft.models.base.cpu_bf16 import cpu_bf16
from tuna_peft.models.base.dequantise import keep_quantised_layout, require_exact_dequantisation
from tuna_peft.models.base.hub_files import CACHE, hub_file
from tuna_peft.models.base.stored_weights import (
    SAME_MODEL,
    require_all_weights,
    require_readable_weights,
    safetensors_files,
    weights_fingerprint,
)

logger = logging.getLogger("tuna_peft")

BUILTIN = {"builtin:pico-llama": "pico_llama"}
QUANTIZATION_METHODS = ("nf4", "fp4", "int8", "none")


@dataclass
class Base:
    """A loaded base model, and what identifies it.

    Attributes:
        model: The causal LM, in evaluation mode, every parameter frozen.
        tokenizer: Its tokenizer; `pad_token` is set (to EOS where it has none: masks are built from lengths, not ids).
        identity: `{"model", "revision", "fingerprint"}`, see `base_identity`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, Any]


def resolve_model_path(model: str) -> str:
    """The folder inside the package for `builtin:pico-llama`; paths and Hub ids are returned unchanged."""
    if model.startswith("builtin:"):
        if model not in BUILTIN:
            raise UserError(f"no built-in model {model!r}", fix=f"Known: {', '.join(BUILTIN)}.")
        return str(resources.files("tuna_peft.assets") / BUILTIN[model])
    return model


def model_id(model: PreTrainedModel) -> str:
    """The name that loads `model` again: a Hub id, a path, or a `builtin:` name."""
    path = str(model.config._name_or_path)
    return next((name for name in BUILTIN if Path(path) == Path(resolve_model_path(name))), path)


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is the GPU when there is one; under a launcher, `auto` and `cuda` are the GPU of this process.

    Raises:
        UserError: `device` is a GPU and PyTorch finds none.
    """
    there = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if there and os.environ.get("ACCELERATE_USE_CPU") != "true" else "cpu"
    if device.startswith("cuda") and not there:
        raise UserError(
            "PyTorch sees no GPU here",
            where=f"device {device}",
            fix="`tuna-peft doctor` says why; use `cpu` to run without one.",
        )
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def resolve_dtype(dtype: str = "auto", device: torch.device | None = None, hidden: int | None = None) -> torch.dtype:
    """The dtype of weights and computation.

    `auto` is bf16 on GPUs from Ampere on, fp16 on older ones (T4), and on a CPU bf16 where it is faster, else fp32
    (see `cpu_bf16`).

    Args:
        hidden: Hidden size of the model; None for a large one.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if (device or resolve_device()).type != "cuda":
        return torch.bfloat16 if cpu_bf16(hidden).fast else torch.float32
    return torch.bfloat16 if is_ampere_or_later(torch.cuda.get_device_capability(device)) else torch.float16


def hidden_size(config: PretrainedConfig) -> int | None:
    """The size of a model's hidden states; None if its configuration does not say."""
    return getattr(config.get_text_config(), "hidden_size", None)


def make_quantization_config(
    method: str = "nf4",
    *,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    storage_dtype: torch.dtype = torch.uint8,
) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration for `nf4`, `fp4`, `int8`; None for `none`.

    `storage_dtype` is the dtype that holds 4-bit codes: the bits are the same, but FSDP2 shards floating dtypes only.

    Raises:
        UserError: The method is unknown.
    """
    if method == "none":
        return None
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if method not in QUANTIZATION_METHODS:
        raise UserError(f"unknown quantization {method!r}", fix=f"Use one of {', '.join(QUANTIZATION_METHODS)}.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
    )


def load_base(
    model: str,
    *,
    revision: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> Base:
    """Loads and freezes a base model.

    Embeddings, norms and head stay in `dtype` (16-bit on a GPU). PEFT's `prepare_model_for_kbit_training` would cast
    embedding and head to fp32, about 2 GB at a vocabulary of 128k; this is not needed, because log-probabilities are
    computed in fp32 chunk by chunk (`tuna_peft.models.forward.logps`).

    Args:
        model: Hub id, local path, or `builtin:pico-llama`.
        revision: Branch, tag or commit on the Hub.
        quantization_config: See `make_quantization_config`; None loads the model unquantized.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`...
        attn_implementation: `sdpa` is `eager` for models that do not support it, such as Gemma 2.

    Raises:
        UserError: The model does not exist, cannot be read, or is not a decoder-only causal LM.
    """
    target = resolve_device(device)
    config, tokenizer = load_config_and_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None for code from the Hub
    if attn_implementation == "sdpa" and kind is not None and not kind._supports_sdpa:
        attn_implementation = "eager"
    require_readable_weights(resolve_model_path(model), revision)
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            resolve_model_path(model),
            config=config,
            dtype=resolve_dtype(dtype, target, hidden_size(config)),
            quantization_config=quantization_config,
            # Load directly onto the GPU: the host of a T4 often has less memory than a 7B model in fp16.
            device_map={"": target} if quantization_config is not None or target.type != "cpu" else None,
            use_safetensors=True,  # loading a pickle can run code
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors and bitsandbytes each raise their own types
        if "ignore_mismatched_sizes" in str(error):  # what to set is an argument that this function does not have
            raise UserError(
                "the stored weights have other shapes than config.json says", where=model, fix=SAME_MODEL
            ) from error
        raise UserError(f"cannot load {model!r}: {first_line(error)}") from error
    require_all_weights(loaded, found["missing_keys"], model)
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.use_cache = False
    keep_quantised_layout(loaded)
    require_exact_dequantisation(loaded)
    loaded.requires_grad_(False)
    loaded.eval()
    return Base(loaded, tokenizer, base_identity(loaded))


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads the configuration of a base.

    Raises:
        UserError: It does not exist, is gated, cannot be reached or read, or is not a decoder-only causal LM.
    """
    path, options = _place(model, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # damaged files of a model raise almost any type
        raise _cannot_load(model, path, first_line(error)) from error
    _require_causal_lm(config, model)
    return config


def _place(model: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the files of a model, and the options to load them with."""
    path = resolve_model_path(model)
    on_hub = path == model and not Path(path).exists()
    # First, because its errors are clearer than those of transformers, and it notices a missing network at once.
    offline = on_hub and hub_file(model, "config.json", revision)[1] == CACHE
    return path, {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": offline}


def load_config_and_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Loads the configuration and the tokenizer of a base, without its weights.

    Args:
        model, revision, trust_remote_code: See `load_base`.

    Returns:
        The configuration, and the tokenizer with a `pad_token` (EOS where it has none, or
        one that the model has no row for).

    Raises:
        UserError: It does not exist, is gated, cannot be reached or read, or is not a decoder-only causal LM.
    """
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    path, options = _place(model, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        raise _cannot_load(model, path, first_line(error)) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model!r} has no EOS token", fix="Set `eos_token` in its tokenizer config.")
    rows = getattr(config.get_text_config(), "vocab_size", None) or math.inf
    if tokenizer.eos_token_id >= rows:
        raise UserError(
            f"the EOS token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, and the model has {rows:,} rows",
            where=model,
            fix="Take the tokenizer that belongs to the model.",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        if tokenizer.pad_token_id is not None:  # added to the tokenizer, but not to the model
            logger.warning("the model has no row for %r: padding with EOS instead", tokenizer.pad_token)
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def _cannot_load(model: str, path: str, reason: str) -> UserError:
    """The error for what transformers says about a configuration or a tokenizer."""
    fix = "Check the path or Hub id."
    if "custom code" in reason:
        reason, fix = "it comes with Python code of its own", "If you trust it, set base.trust_remote_code: true."
    elif "does not recognize this architecture" in reason:
        reason, fix = (
            reason.split(" but ")[0] + f" and transformers {transformers.__version__} does not know it",
            ("Upgrade transformers, or use another base."),
        )
    elif wrong := _wrong_file(path):
        reason, fix = wrong
    elif Path(path).is_dir() and not [*Path(path).glob("tokenizer*"), *Path(path).glob("vocab*")]:
        reason, fix = "the folder has no tokenizer files", "Copy tokenizer.json and tokenizer_config.json into it."
    return UserError(f"cannot load the base model {model!r}: {reason}", fix=fix)


def _wrong_file(path: str) -> tuple[str, str] | None:
    """Which of a folder's JSON files is something else, and what to do."""
    for file in sorted(Path(path).glob("*.json")):
        if found := wrong_content(file):
            return f"{file.name} is {found[0]}", found[1]
    return None


def require_unquantized(config: PretrainedConfig, model: str, *, merging: bool = True) -> None:
    """Checks that the stored weights of a base are not quantized: `quantization` quantizes them on loading.

    Args:
        config: The configuration as stored.
        model: The base's name, for the error.
        merging: Whether a merged model is wanted; without it, weights stored by bitsandbytes are accepted.

    Raises:
        UserError: They are quantized, by GPTQ, AWQ, compressed-tensors, fp8 ...
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    if method != "bitsandbytes" or merging:
        raise UserError(
            f"the stored weights of the base are already quantized ({method})",
            where=model,
            fix="Take the 16-bit model that they were made from; `quantization` quantizes it on loading.",
        )


def _require_causal_lm(config: Any, model: str) -> None:
    architectures = config.architectures or []
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder
    named = not architectures or any("CausalLM" in name or "LMHead" in name for name in architectures)
    if not (decoder and named) and not hasattr(config, "auto_map"):
        raise UserError(
            f"{model!r} is no causal language model (model type {config.model_type}, "
            f"{architectures or 'no architecture'})",
            fix="Use a decoder-only model such as LLaMA, Mistral, Qwen or Gemma.",
        )


def base_identity(model: PreTrainedModel) -> dict[str, Any]:
    """`{"model", "revision", "fingerprint"}`: the origin of a base and a hash of its stored weights."""
    revision = getattr(model.config, "_commit_hash", None)
    files = safetensors_files(str(model.config._name_or_path), revision)
    return {"model": model_id(model), "revision": revision, "fingerprint": weights_fingerprint(files)}
