"""The checks of `tuna-peft doctor`: one function for each part, which returns its findings."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from tuna_peft.limits import GIB

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: What was checked.
        status: `fail` means that no run can work, `warning` that some runs cannot.
        detail: The finding; unless it is `ok`, with the reason and the remedy.
    """

    name: str
    status: Literal["ok", "warning", "fail"]
    detail: str


def run_checks() -> Iterator[Check]:
    """Runs all checks in order. A check that raises an error is a finding, too."""
    parts: list[Callable[[], list[Check]]] = [
        check_versions, check_torchao, check_device, check_bitsandbytes, check_ranking_step, check_disk, check_hub,
    ]  # fmt: skip
    for part in parts:
        try:
            yield from part()
        except Exception as error:  # doctor must report any failure of a library
            name = part.__name__.removeprefix("check_")
            yield Check(name, "fail", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def check_versions() -> list[Check]:
    """The versions of Python and of the packages, compared with the bounds that this package declares."""
    checks = [Check("python", "ok", platform.python_version())]  # pip has checked the bound of Python
    bounds = _declared_bounds()
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            checks.append(Check(name, "fail", f"not installed; run: pip install '{bounds.get(name, name)}'"))
            continue
        bound = bounds.get(name)
        if bound is None or bound.specifier.contains(found, prereleases=True):
            checks.append(Check(name, "ok", found))
        else:
            checks.append(Check(name, "fail", f"{found}, but {bound.specifier} is needed; run: pip install '{bound}'"))
    return checks


def check_torchao() -> list[Check]:
    """PEFT cannot create LoRA layers if an old torchao is installed, as on Colab. tuna_peft does not need torchao."""
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError as error:
        return [Check("torchao", "warning", f"{error}, and PEFT fails because of it; run: pip uninstall torchao")]
    return []


def check_device() -> list[Check]:
    """The GPUs, and the dtype that `auto` means on them, with the reason."""
    import torch

    from tuna_peft.models.base.cpu_bf16 import cpu_bf16
    from tuna_peft.models.base.load import resolve_dtype

    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver"
        return [
            Check("gpu", "warning", f"none ({why}): small models only, on {cores} CPU cores"),
            Check("dtype", "ok", f"{'bfloat16' if cpu_bf16().fast else 'float32'}: {cpu_bf16().reason}"),
        ]
    checks = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        checks.append(Check(f"gpu {index}", "ok", f"{properties.name}, {memory}, {capability}"))
    dtype = str(resolve_dtype("auto", torch.device("cuda"))).removeprefix("torch.")
    why = (
        "native from compute capability 8.0 on"
        if dtype == "bfloat16"
        else "no native bf16 before compute capability 8.0"
    )
    checks.append(Check("dtype", "ok", f"{dtype}: {why}"))
    return checks


def check_bitsandbytes() -> list[Check]:
    """Quantizes a matrix to NF4 and dequantizes it on the device that a run would use."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from tuna_peft.models.base.load import resolve_device

    device = resolve_device()
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((dequantize_4bit(packed, state).float() - weight).abs().mean())
    # NF4 in blocks of 64 leaves a mean error of about 0.073 on normal weights.
    if not 0 < error < 0.1:
        return [
            Check("nf4", "fail", f"wrong on {device.type}: mean error {error:.3f} of normal weights, expected 0.07")
        ]
    return [
        Check("nf4", "ok", f"quantizes and dequantizes on {device.type} (mean error {error:.3f} of normal weights)")
    ]


def check_ranking_step() -> list[Check]:
    """Runs the kernels of a ranking stage on a tiny model, on the device and in the precision that a run would use.

    Scores a short and a long row with the built-in model in 4 bits, computes gradients of an adapter, and generates.
    """
    import torch
    from peft import LoraConfig
    from transformers.utils import logging

    from tuna_peft.data.collate import RankedCollator
    from tuna_peft.models.base.load import load_base, make_quantization_config, resolve_device, resolve_dtype
    from tuna_peft.models.forward import scoring
    from tuna_peft.models.forward.checkpointing import checkpoint_activations
    from tuna_peft.models.forward.prefix import LONG_ROW, describe_attention
    from tuna_peft.models.forward.verify import verify_packing
    from tuna_peft.models.generation.generate import generate_responses
    from tuna_peft.models.stack.adapters import push_adapter

    logging.disable_progress_bar()
    device, dtype = resolve_device(), resolve_dtype()
    base = load_base("builtin:pico-llama", quantization_config=make_quantization_config(compute_dtype=dtype))
    model = push_adapter(base.model, "check", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    checkpoint_activations(model, True, use_reentrant=False)
    difference, draw = 0.0, torch.Generator().manual_seed(0)
    for length in (8, LONG_ROW // 4):  # length of the prompt and of each response
        prompt, *responses = torch.randint(10, 1000, (4, length), generator=draw).tolist()
        row = {"prompt_ids": prompt, "completions_ids": responses, "completion_skips": [0] * 3, "ranks": [0, 1, 2]}
        batch = RankedCollator(0)([row]).to(device)
        with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
            difference = max(difference, verify_packing(model, row, device))
            score = scoring.response_logps(model.train(), batch).normalised().sum()
        score.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    if not all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients):
        return [Check("ranking step", "fail", f"gradients on {device.type} in {dtype}: missing, zero or not finite")]
    generate_responses(model, base.tokenizer, [prompt, prompt[:8]], max_new_tokens=4)
    agree = f"on {device.type}: packed sequences match separate ones to {difference:.1e} nats per token"
    return [Check("ranking step", "ok", f"{agree}; {describe_attention(model, device)}")]


def check_disk() -> list[Check]:
    """Free disk space in the current folder, for runs, and in the Hub cache, for models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    checks = []
    for name, folder in (("disk here", Path.cwd()), ("disk of the Hub cache", Path(HF_HUB_CACHE))):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{free / GIB:,.1f} GiB free in {folder}"
        if not os.access(existing, os.W_OK):
            checks.append(Check(name, "fail" if name == "disk here" else "warning", f"cannot write in {folder}"))
        elif free < GIB / 4:
            checks.append(Check(name, "fail", f"{text}; not enough for any run"))
        elif free < 20 * GIB:
            checks.append(
                Check(name, "warning", f"{text}; a 7B model needs about 20 (16-bit base, or a merged model)")
            )
        else:
            checks.append(Check(name, "ok", text))
    return checks


def check_hub(timeout: float = 3.0) -> list[Check]:
    """Whether the Hub can be reached. Being offline is only a warning: local and cached models work."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    offline = "only local, built-in and cached models and data work"
    if HF_HUB_OFFLINE:
        return [Check("hub", "warning", f"HF_HUB_OFFLINE is set: {offline}")]
    request = urllib.request.Request(ENDPOINT, method="HEAD", headers={"User-Agent": "tuna-peft"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return [Check("hub", "warning", f"{ENDPOINT} answers {error.code}: {offline}")]
    except OSError as error:
        return [
            Check("hub", "warning", f"{ENDPOINT} cannot be reached ({getattr(error, 'reason', error)}): {offline}")
        ]
    token = "logged in" if get_token() else "no token: public models only; `hf auth login` for gated ones"
    return [Check("hub", "ok", f"{ENDPOINT} answers, {token}")]


def _declared_bounds() -> dict[str, Requirement]:
    try:
        lines = requires("tuna-peft") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    parsed = [Requirement(line) for line in lines]
    return {entry.name: entry for entry in parsed if entry.marker is None or entry.marker.evaluate()}
