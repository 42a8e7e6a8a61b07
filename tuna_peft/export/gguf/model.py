"""A merged model as one or more GGUF files, streamed tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from gguf import Metadata
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.export.base_weight import skeleton
from tuna_peft.export.factors import Factors, StackFactors
from tuna_peft.export.gguf.architecture import Architecture
from tuna_peft.export.gguf.llama_quantize import K_QUANTS, find_llama_quantize, quantize
from tuna_peft.export.gguf.metadata import general_metadata
from tuna_peft.export.gguf.modelfile import MODELFILE, write_modelfile
from tuna_peft.export.gguf.tensors import BELOW_8_BITS, TYPES, GGUFTensor, plan_tensors, reorder_heads, unaligned
from tuna_peft.export.gguf.tokenizer import strips_after_special_tokens, write_tokenizer
from tuna_peft.export.kept_update import KeptUpdate, ModuleUpdate
from tuna_peft.export.output import RECORD, require_replaceable, require_space
from tuna_peft.export.safetensors_stream import SafetensorsReader
from tuna_peft.files import atomic_directory, write_json
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.models.base.stored_weights import safetensors_files
from tuna_peft.progress import Progress

logger = logging.getLogger("tuna_peft")

_METADATA = 64 << 20  # allowed for tokenizer and headers when space is checked

LOST_UPDATE = "Use q8_0 or f16, or let `--base auto` compare both bases."


@dataclass(frozen=True)
class GGUFReport:
    """What an export wrote.

    Attributes:
        path: The folder.
        files: Sizes in bytes by file name.
        kept_in_f16: By file, the tensors whose rows are no whole number of blocks of the file's type.
        kept_update: By file, which share of the adapters' update it has; None if that was not measured.
        seconds: Wall-clock time.
    """

    path: Path
    files: dict[str, int]
    kept_in_f16: dict[str, list[str]]
    kept_update: dict[str, KeptUpdate | None]
    seconds: float

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    @property
    def kept_share(self) -> float | None:
        """The smallest share of the update that a file keeps; None if that was not measured."""
        return min((kept.share for kept in self.kept_update.values() if kept is not None), default=None)


def export_gguf(
    model: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    types: Sequence[str] = ("q8_0",),
    name: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    stack_dir: str | os.PathLike[str] | None = None,
    allow_lost_update: bool = False,
) -> GGUFReport:
    """Writes a model as `NAME-TYPE.gguf`, one file per type, with an Ollama `Modelfile` for the first.

    Tensors go one at a time from safetensors to the file; no model is built.

    Args:
        model: A merged model's folder, or that of any LLaMA, Mistral, Qwen 2 or Qwen 3 in safetensors; `builtin:`.
        out_dir: Appears whole or not at all; an earlier export there is replaced.
        types: Number formats, see `TYPES`; and `K_QUANTS` if llama.cpp's `llama-quantize` is installed.
        name: The model's name; by default that of its folder.
        imatrix: An importance matrix for the K-quants, as `llama-imatrix` writes it.
        stack_dir: The stack that was merged into the model, to measure how much of its update each file keeps (not for
            `f32` and the K-quants).
        allow_lost_update: Only warn when a type undoes more than half of that update.

    Raises:
        UserError: An unknown type, a type or importance matrix without `llama-quantize`, a model or tokenizer that
            llama.cpp cannot run, a checkpoint that does not fit its configuration, no space, an `out_dir` in use, or a
            type in which most of the update is lost.
    """
    start = time.perf_counter()
    types = check_types(types)
    k_quants = [type for type in types if type in K_QUANTS]
    program = find_llama_quantize() if k_quants else ""
    if imatrix is not None and not (k_quants and Path(imatrix).is_file()):
        what = f"no file {imatrix}" if k_quants else "an importance matrix has no effect on these types"
        raise UserError(what, fix=f"Give the file of llama-imatrix, with some of {', '.join(K_QUANTS)}.")
    folder = Path(resolve_model_path(os.fspath(model)))
    if not (folder / "config.json").is_file():
        raise UserError(
            "no model here (no config.json)",
            where=str(folder),
            fix="Give a merged model's folder, or a run that has `merged/`.",
        )
    source = SafetensorsReader(safetensors_files(str(folder)))
    if not source.specs:
        raise UserError("the model has no safetensors weights", where=str(folder), fix="Save it in safetensors.")
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        raise UserError("the weights are quantized already", where=str(folder), fix="Export a 16-bit merged model.")
    architecture = Architecture.of(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = {key: tuple(value.shape) for key, value in skeleton(folder, None).state_dict().items()}
    stored = {key: spec.shape for key, spec in source.specs.items()}
    # K-quants are made from a lossless file, so that nothing is rounded twice.
    lossless = "bf16" if {spec.dtype for spec in source.specs.values()} == {"BF16"} else "f32"
    written = [type for type in types if type not in k_quants]
    if k_quants and lossless not in written:
        written.append(lossless)
    plans = {type: plan_tensors(architecture, expected, stored, type) for type in written}
    name = name or folder.resolve().name
    files = {type: f"{name}-{type.upper()}.gguf" for type in [*types, *written]}

    require_replaceable(out_dir, [folder])
    needed = sum(tensor.nbytes for plan in plans.values() for tensor in plan) + _METADATA * len(plans)
    require_space(out_dir, needed + needed * len(k_quants) // (2 * len(plans)))
    record = read_record(folder)
    stack = record.get("stack", {})
    prompt = stack.get("prompt", {})
    parameters = sum(math.prod(shape) for shape in expected.values())
    metadata = general_metadata(_name_for_llama_cpp(name, tokenizer), stack, folder, parameters)
    _warn_of_two_grids(record, types)
    factors = None if stack_dir is None else StackFactors(stack_dir, stack["adapters"][-1]["name"])
    kept: dict[str, KeptUpdate | None] = dict.fromkeys(files.values())
    with atomic_directory(out_dir) as aside:
        for type, plan in plans.items():
            with open_writer(aside / files[type], architecture, metadata, type) as writer:
                architecture.write(writer)
                write_tokenizer(writer, tokenizer, config.vocab_size, prompt)
                updates = _write_tensors(writer, plan, source, architecture, files[type], factors)
            kept[files[type]] = found = KeptUpdate.over(updates)
            if found is not None and type in types:
                found.check(files[type], LOST_UPDATE, allow_lost_update=allow_lost_update)
        for type in k_quants:
            quantize(program, aside / files[lossless], aside / files[type], type, imatrix)
        for type in set(written) - set(types):
            (aside / files.pop(type)).unlink()
        write_modelfile(aside / MODELFILE, files[types[0]], tokenizer, prompt)
        for license in [*folder.glob("LICENSE*"), *folder.glob("NOTICE*")]:
            shutil.copyfile(license, aside / license.name)
        kept = {file: kept[file] for file in files.values()}
        changes = {"kind": "gguf", "types": types, "files": list(files.values())}
        shares = {file: found and asdict(found) for file, found in kept.items()}
        write_json(aside / RECORD, {**record, **changes, "kept_update": shares})
    return GGUFReport(
        path=Path(out_dir),
        files={file: (Path(out_dir) / file).stat().st_size for file in files.values()},
        kept_in_f16={
            file: [tensor.name for tensor in unaligned(plans[type], type)] if type in plans else []
            for type, file in files.items()
        },
        kept_update=kept,
        seconds=time.perf_counter() - start,
    )


def require_exportable(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks what can be known of a model before its weights are: for a run, before it trains.

    Raises:
        UserError: llama.cpp cannot run this model or its tokenizer.
    """
    architecture = Architecture.of(config)
    write_tokenizer(gguf.GGUFWriter(None, architecture.name), tokenizer, config.vocab_size, {})


def check_types(types: Sequence[str]) -> list[str]:
    """The types in lower case, each once.

    Raises:
        UserError: None, or one that is unknown.
    """
    wanted = list(dict.fromkeys(type.lower() for type in types))
    for type in wanted:
        if type not in (*TYPES, *K_QUANTS):
            raise UserError(
                f"unknown GGUF type {type!r}",
                fix=f"Use one of {', '.join(TYPES)}; with llama-quantize also {', '.join(K_QUANTS)}.",
            )
    if not wanted:
        raise UserError("no GGUF type to write", fix=f"Give some of {', '.join(TYPES)}.")
    return wanted


@contextlib.contextmanager
def open_writer(path: Path, architecture: Architecture, metadata: Metadata, type: str) -> Iterator[gguf.GGUFWriter]:
    """A writer with the entries that every file has; closed however the block ends."""
    writer = gguf.GGUFWriter(path, architecture.name)
    with contextlib.closing(writer):
        metadata.set_gguf_meta_model(writer)
        writer.add_file_type(TYPES[type][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        yield writer


def _write_tensors(
    writer: gguf.GGUFWriter,
    plan: Sequence[GGUFTensor],
    source: SafetensorsReader,
    architecture: Architecture,
    description: str,
    factors: StackFactors | None,
) -> dict[str, ModuleUpdate]:
    """Writes the data of all tensors.

    Returns:
        By module with adapters, how much of the update is in the file; empty without `factors` and in fp32.
    """
    updates = {}
    writer.add_type(gguf.GGUFType.MODEL)
    for tensor in plan:
        tensor.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    cpu = torch.device("cpu")
    with Progress(description, sum(tensor.nbytes for tensor in plan), "B") as progress:
        for tensor in plan:
            if tensor.source is None:
                writer.write_tensor_data(architecture.rope_tensors()[tensor.name])
            else:
                weight = source.read(tensor.source, cpu)
                heads, offset = architecture.rotated_heads(tensor.source), architecture.stored_offset(tensor.source)
                data = tensor.convert(weight, heads, offset)
                writer.write_tensor_data(data)
                module = tensor.source.removesuffix(".weight")
                if factors is not None and module in factors.shapes and tensor.format is not Format.F32:
                    updates[module] = _update_in(tensor, data, weight, factors.of(module), heads)
            progress.update(tensor.nbytes)
    return updates


def _update_in(
    tensor: GGUFTensor, data: np.ndarray, weight: torch.Tensor, factors: Factors, heads: int | None
) -> ModuleUpdate:
    """Compares a merged weight as stored with its base, converted in the same way."""
    update = factors.b @ factors.a
    base = tensor.convert(weight.float() - update, heads)
    if heads is not None:
        update = reorder_heads(update, heads)
    rounded, rounded_base = (torch.from_numpy(gguf.dequantize(values, tensor.format)) for values in (data, base))
    measured = ModuleUpdate()
    measured.add(rounded, rounded_base, update)
    return measured


def _name_for_llama_cpp(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name in the file, by which llama.cpp decides whether special tokens take the white space after them."""
    is_phi3 = re.search("phi-?3", name, re.IGNORECASE)
    if strips_after_special_tokens(tokenizer):
        return name if is_phi3 else f"{name} (Phi-3)"
    return re.sub("(?i)(phi)-?3", r"\1 3", name)


def _warn_of_two_grids(record: dict[str, Any], types: Sequence[str]) -> None:
    """Warns that weights that were quantized to 4 bits once will be quantized a second time."""
    coarse = [type for type in types if type in (*BELOW_8_BITS, *K_QUANTS)]
    quantization = record.get("stack", {}).get("quantization") or {}
    if coarse and record.get("base") != "original" and quantization.get("load_in_4bit"):
        logger.warning(
            "GGUF %s: this model was merged into the dequantized base, so its weights are quantized a second time. "
            "The original base (`tuna-peft merge --base original`) may be closer: `tuna-peft export gguf STACK OUT "
            "--base auto` measures both and keeps the closer one.",
            ", ".join(coarse),
        )


def read_record(folder: Path) -> dict[str, Any]:
    """What an export says of the stack in it; empty for anything else."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
