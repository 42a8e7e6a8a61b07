"""Measures how far finished exports are from the unmerged adapters, loading them with plain PEFT and transformers.

`run.exports`, `compare` and the command `divergence` call it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tuna_peft.errors import UserError
from tuna_peft.export.base_files import locate_base
from tuna_peft.export.divergence import Divergence, divergence, fp32_computation, iter_logits
from tuna_peft.export.factors import Factors, StackFactors
from tuna_peft.export.load_gguf import gguf_files, load_gguf
from tuna_peft.export.loading import BASE, UNQUANTIZED
from tuna_peft.files import temporary_directory
from tuna_peft.limits import MERGED_WEIGHTS, available_ram, merged_weights_on_gpu
from tuna_peft.models.base.dequantise import keep_quantised_layout, require_exact_dequantisation
from tuna_peft.models.base.load import resolve_device, resolve_dtype
from tuna_peft.models.base.memory import free_memory
from tuna_peft.models.stack.files import AdapterStack
from tuna_peft.models.stack.find import find_stack
from tuna_peft.models.stack.manifest import read_manifest
from tuna_peft.progress import tracked


def check_exports(
    stack_dir: str | os.PathLike[str],
    exports: Iterable[str | os.PathLike[str]],
    prompts: Sequence[Sequence[int]],
    **loading: Any,
) -> dict[str, Divergence]:
    """The KL divergence of combined adapters, merged models and GGUF files from the stack, by export path.

    `BASE` is the divergence of the base, as a scale. Adapters of a quantized base are measured twice: on that base,
    and with the suffix `UNQUANTIZED` on the base as stored, because many programs that load adapters do not quantize.

    One model is loaded at a time. The stack's logits stay in memory meanwhile (4 bytes x tokens x vocabulary: 64 MB
    for 500 tokens at 32k), so use few prompts. All models compute in fp32 with their weights as they are, so that only
    the rounding of the export is measured; the results say what rounding in training's dtype adds. Models with 16-bit
    weights are larger than the 4-bit base: layers that do not fit on the GPU are offloaded to main memory, then to
    disk.

    Args:
        stack_dir: The folder with `stack.json`.
        exports: Folders of `combine_stack` and `merge_stack`; GGUF files, or folders of them, each file measured.
        prompts: Token ids of each prompt.
        loading: Keyword arguments of `ExportComparison`.

    Raises:
        UserError: A broken stack, no prompts, or a GGUF file that transformers cannot read.
    """
    given = [Path(export) for export in exports]
    folders = [path for export in given for path in gguf_files(export) or [export]]
    adapters = [folder for folder in folders if is_adapter(folder)]
    comparison = ExportComparison(stack_dir, prompts, **loading)
    results = {BASE: comparison.base()}
    results |= {str(folder): comparison.adapter(folder) for folder in adapters}
    if comparison.is_quantized:
        results |= {str(folder) + UNQUANTIZED: comparison.adapter_on_unquantized(folder) for folder in adapters}
    results |= {str(folder): comparison.model(folder) for folder in folders if folder not in adapters}
    return results


def is_adapter(folder: Path) -> bool:
    """Whether an export is an adapter that needs its base; one with the base beside it is a model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


class ExportComparison:
    """Compares exports with the logits of the unmerged adapters on some prompts: first adapters, then models.

    Args:
        stack_dir, prompts: As in `check_exports`.
        dtype: In which the base is loaded for the stack; `auto` is the dtype of training, from the manifest.
        upto, base_model, device, trust_remote_code: As in `AdapterStack.from_pretrained`.

    Attributes:
        is_quantized: Whether the stack was trained on a quantized base.
        dtype: The dtype in which it was trained.
        noise: The divergence of the stack computing in that dtype from itself in fp32; None if that is fp32.

    Raises:
        UserError: A broken stack, or no prompts.
    """

    noise: Divergence | None = None

    def __init__(
        self,
        stack_dir: str | os.PathLike[str],
        prompts: Sequence[Sequence[int]],
        *,
        upto: str | None = None,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ):
        self._batches = [torch.tensor([list(prompt)]) for prompt in prompts if len(prompt)]
        if not self._batches:
            raise UserError("no prompts to compare on", fix="Give some held-out prompts.")
        folder = find_stack(stack_dir)
        manifest = read_manifest(folder)
        self._device, self._trust_remote_code = resolve_device(device), trust_remote_code
        self.dtype = resolve_dtype(manifest.load_dtype or "auto" if dtype == "auto" else dtype, self._device)
        self.is_quantized = manifest.quantization is not None
        self._locate_base = partial(locate_base, manifest, base_model, folder)
        stack = AdapterStack.from_pretrained(
            folder,
            upto=upto,
            base_model=base_model,
            device=device,
            dtype=str(self.dtype).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
        )
        with fp32_computation(stack.model):
            self._logits = list(iter_logits(stack.model, self._batches))
        if self.dtype != torch.float32:
            self.noise = divergence(self._logits, stack.model, self._batches)
        self._config = stack.model.config
        self._base: Any = stack.model.unload() if isinstance(stack.model, PeftModel) else stack.model

    def base(self) -> Divergence:
        """The divergence of the base without adapters, as a scale. Call it before `model`."""
        return self._divergence(self._base, "base")

    def adapter(self, folder: Path) -> Divergence:
        """The divergence of a combined adapter on the stack's base, loaded by plain PEFT. Call it before `model`."""
        combined = PeftModel.from_pretrained(self._base, str(folder)).eval()
        result = self._divergence(combined, folder.name)
        self._base = combined.unload()
        return result

    def adapter_on_unquantized(self, folder: Path) -> Divergence:
        """The divergence of a combined adapter on the base without quantization. Frees the stack's base."""
        factors = StackFactors.of_adapter(folder)
        with self._from_pretrained(self._locate_base(), folder.parent) as model:
            # Not by PEFT, which would have to load a base that is partly on disk once more.
            for name in factors.shapes:
                model.get_submodule(name).register_forward_hook(partial(_add_update, factors.of(name)))
            return self._divergence(model, f"{folder.name}{UNQUANTIZED}")

    def model(self, folder: Path) -> Divergence:
        """The divergence of a model or a GGUF file, loaded by plain transformers. Frees the stack's base."""
        if folder.suffix == ".gguf":
            self._base = None
            free_memory()
            return self._divergence(load_gguf(folder, self._config, self.dtype, self._device), folder.name)
        with self._from_pretrained(folder, folder.parent) as model:
            return self._divergence(model, folder.name)

    @contextlib.contextmanager
    def _from_pretrained(self, folder: Path, work_dir: Path) -> Iterator[torch.nn.Module]:
        self._base = None
        free_memory()
        with temporary_directory(work_dir / "offload") as offload:
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                trust_remote_code=self._trust_remote_code,
                offload_folder=str(offload),
                **self._placement(folder),
            )
            keep_quantised_layout(model)
            require_exact_dequantisation(model)
            yield model.eval()

    def _divergence(self, model: torch.nn.Module, name: str) -> Divergence:
        batches = tracked(self._batches, f"measuring {name}", "batches")
        with fp32_computation(model):
            found = divergence(self._logits, model, batches)
        return dataclasses.replace(found, noise=None if self.noise is None else self.noise.kl_mean)

    def _placement(self, folder: Path) -> dict[str, Any]:
        """Where a model's layers go, for `from_pretrained`."""
        config, device = AutoConfig.from_pretrained(folder, trust_remote_code=self._trust_remote_code), self._device
        if hasattr(config, "quantization_config") or device.type not in ("cuda", "cpu"):
            return {"device_map": {"": device}}  # bitsandbytes offloads none; 4 bits fit where the stack did
        memory: dict[int | str, int] = {}
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            text = config.get_text_config()
            place = torch.cuda.current_device() if device.index is None else device.index
            memory[place] = int(merged_weights_on_gpu(free, text.vocab_size * text.hidden_size))
        memory["cpu"] = int(MERGED_WEIGHTS * available_ram())
        return {"device_map": "auto", "max_memory": memory}


def _add_update(factors: Factors, _: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """A forward hook that adds `B A x` to a linear layer's output."""
    x = args[0].float()
    return output + x @ factors.a.to(x.device).T @ factors.b.to(x.device).T
