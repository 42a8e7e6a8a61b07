"""A LoRA adapter as a GGUF file that llama.cpp applies to a model's GGUF file (`--lora`)."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import gguf
from transformers import AutoConfig, AutoTokenizer

from tuna_peft.errors import UserError
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.gguf.architecture import Architecture
from tuna_peft.export.gguf.metadata import general_metadata
from tuna_peft.export.gguf.model import GGUFReport, open_writer, read_record
from tuna_peft.export.gguf.modelfile import MODELFILE, write_modelfile
from tuna_peft.export.gguf.tensors import TYPES, GGUFTensor, reorder_heads, tensor_name
from tuna_peft.export.output import require_replaceable, require_space, write_record
from tuna_peft.files import atomic_directory
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.models.stack.manifest import MANIFEST

BASE_FILE = "base.gguf"  # where the Modelfile expects the base: the adapter alone says nothing of its file
ADAPTER_TYPES = ("f32", "f16")  # a 16-bit B loses less than a 4-bit base does; llama.cpp adds in fp32 either way


def export_gguf_adapter(
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    type: str = "f32",
    name: str = "adapter",
    upto: str | None = None,
    base_model: str | None = None,
) -> GGUFReport:
    """Writes a whole stack, or one PEFT adapter, as `NAME-LORA-TYPE.gguf`.

    GGUF stores one alpha and scales every module by alpha / rank. The scalings (rank-stabilised or not, of every
    adapter) are therefore multiplied into B, so that alpha / rank is one for each module.

    Args:
        adapter: A folder with `stack.json`, or with one plain LoRA adapter such as a combined one.
        out_dir: Appears whole or not at all; an earlier export there is replaced.
        type: `f32` or `f16`.
        name: The name in the file's name.
        upto: For a stack: export the adapters up to this one.
        base_model: Where the base is now, if it has moved; only its configuration is read.

    Raises:
        UserError: A broken stack, a part of a stack, adapters that are not plain LoRA, a base that llama.cpp cannot
            run, no space, or an `out_dir` in use.
    """
    start = time.perf_counter()
    if type not in ADAPTER_TYPES:
        raise UserError(f"GGUF adapters cannot be {type!r}", fix=f"Use one of {', '.join(ADAPTER_TYPES)}.")
    folder = Path(adapter)
    factors = _factors_of(folder, upto)
    manifest = factors.manifest
    base, revision = (base_model, None) if base_model else (manifest.base["model"], manifest.base["revision"])
    architecture = _architecture_of(base, revision, folder)
    rank = max(shape.rank for shape in factors.shapes.values())
    format = TYPES[type][0]
    plan: dict[str, tuple[GGUFTensor, GGUFTensor]] = {}
    for module, shape in factors.shapes.items():
        target = tensor_name(architecture, f"{module}.weight")
        plan[module] = (
            GGUFTensor(f"{target}.lora_a", module, (shape.rank, shape.inputs), format),
            GGUFTensor(f"{target}.lora_b", module, (shape.outputs, shape.rank), format),
        )
    file = f"{name}-LORA-{type.upper()}.gguf"

    parameters = sum(math.prod(tensor.shape) for pair in plan.values() for tensor in pair)
    metadata = general_metadata(name, asdict(manifest), None, parameters)

    require_replaceable(out_dir, [folder])
    require_space(out_dir, sum(tensor.nbytes for pair in plan.values() for tensor in pair))
    with atomic_directory(out_dir) as aside:
        with open_writer(aside / file, architecture, metadata, type) as writer:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
            for pair in plan.values():
                for tensor in pair:
                    tensor.announce(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for module, (a, b) in plan.items():
                both = factors.of(module)
                scaled = both.b * (factors.shapes[module].rank / rank)
                heads = architecture.rotated_heads(f"{module}.weight")
                writer.write_tensor_data(a.convert(both.a))
                writer.write_tensor_data(b.convert(scaled if heads is None else reorder_heads(scaled, heads)))
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(base), revision=revision)
        write_modelfile(aside / MODELFILE, BASE_FILE, tokenizer, manifest.prompt, adapter=file)
        write_record(aside, "gguf-adapter", manifest, types=[type], files=[file])
    size = (Path(out_dir) / file).stat().st_size
    return GGUFReport(Path(out_dir), {file: size}, {file: []}, {file: None}, time.perf_counter() - start)


def _factors_of(folder: Path, upto: str | None) -> StackFactors:
    if (folder / MANIFEST).is_file() or not (folder / "adapter_config.json").is_file():
        factors = StackFactors(folder, upto)  # says what is missing where there is neither
    elif (folder.parent / MANIFEST).is_file():
        raise UserError(
            "this is one adapter of a stack", where=str(folder), fix=f"Give the whole stack, {folder.parent}."
        )
    else:
        factors = StackFactors.of_adapter(folder)
        factors.manifest.prompt = read_record(folder).get("stack", {}).get("prompt", {})
    if not factors.shapes:
        raise UserError("no adapters to export", where=str(folder))
    return factors


def _architecture_of(base: str, revision: str | None, where: Path) -> Architecture:
    try:
        config = AutoConfig.from_pretrained(resolve_model_path(base), revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the configuration of the base {base!r}: {str(error).splitlines()[0]}",
            where=str(where),
            fix="If it has moved, say where it is now (base_model).",
        ) from error
    return Architecture.of(config)
