"""Measures how far finished exports are from the unmerged adapters, loading them with plain PEFT and transformers.

`run.exports`, `compare` and the command `divergence` call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tuna_peft.errors import UserError
from tuna_peft.export.divergence import Divergence, divergence, iter_logits
from tuna_peft.export.load_gguf import gguf_files, load_gguf
from tuna_peft.files import temporary_directory
from tuna_peft.limits import MERGED_WEIGHTS, available_ram
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
    *,
    upto: str | None = None,
    base_model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Divergence]:
    """The KL divergence of combined adapters, merged models and GGUF files from the stack, by export path.

    One model is loaded at a time. The stack's logits stay in memory meanwhile (4 bytes x tokens x vocabulary: 64 MB
    for 500 tokens at 32k), so use few prompts. Merged models compute in the stack's dtype, so that only the rounding
    of the export is measured. They are larger than the 4-bit base: layers that do not fit on the GPU are offloaded to
    main memory, then to disk.

    Args:
        stack_dir: The folder with `stack.json`.
        exports: Folders of `combine_stack` and `merge_stack`; GGUF files, or folders of them, each file measured.
        prompts: Token ids of each prompt.
        dtype: Dtype of weights and computation; `auto` is the dtype of training, from the manifest.
        upto, base_model, device, trust_remote_code: As in `AdapterStack.from_pretrained`.

    Raises:
        UserError: A broken stack, no prompts, or a GGUF file that transformers cannot read.
    """
    given = [Path(export) for export in exports]
    folders = [path for export in given for path in gguf_files(export) or [export]]
    adapters = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
    comparison = ExportComparison(
        stack_dir,
        prompts,
        upto=upto,
        base_model=base_model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    results = {str(folder): comparison.adapter(folder) for folder in adapters}
    results |= {str(folder): comparison.model(folder) for folder in folders if folder not in adapters}
    return results


class ExportComparison:
    """Compares exports with the logits of the unmerged adapters on some prompts: first adapters, then models.

    Args:
        stack_dir, prompts, upto, base_model, device, dtype, trust_remote_code: As in `check_exports`.

    Raises:
        UserError: A broken stack, or no prompts.
    """

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
        if dtype == "auto":
            dtype = read_manifest(find_stack(stack_dir)).load_dtype or "auto"
        self._device, self._trust_remote_code = resolve_device(device), trust_remote_code
        self._dtype = resolve_dtype(dtype, self._device)
        self._load = partial(
            AdapterStack.from_pretrained,
            stack_dir,
            upto=upto,
            base_model=base_model,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        stack = self._load(dtype=dtype)
        self._logits = list(iter_logits(stack.model, self._batches))
        self._config = stack.model.config
        self._base: Any = stack.model.unload() if isinstance(stack.model, PeftModel) else stack.model

    def base(self) -> Divergence:
        """The divergence of the base without adapters, as a scale."""
        return self._divergence(self._base, "base")

    def stack(self, dtype: str) -> Divergence:
        """The divergence of the unmerged adapters computing in `dtype`: the noise of that dtype's rounding."""
        return self._divergence(self._load(dtype=dtype).model, f"stack in {dtype}")

    def adapter(self, folder: Path) -> Divergence:
        """The divergence of a combined adapter on the stack's base, loaded by plain PEFT. Call it before `model`."""
        combined = PeftModel.from_pretrained(self._base, str(folder)).eval()
        result = self._divergence(combined, folder.name)
        self._base = combined.unload()
        return result

    def model(self, folder: Path) -> Divergence:
        """The divergence of a merged model or a GGUF file, loaded by plain transformers. Frees the stack's base."""
        self._base = None
        free_memory()
        if folder.suffix == ".gguf":
            return self._divergence(load_gguf(folder, self._config, self._dtype, self._device), folder.name)
        with temporary_directory(folder.parent / "offload") as offload:
            merged: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=self._dtype,
                trust_remote_code=self._trust_remote_code,
                offload_folder=str(offload),
                **self._placement(folder),
            )
            keep_quantised_layout(merged)
            require_exact_dequantisation(merged)
            return self._divergence(merged.eval(), folder.name)

    def _divergence(self, model: torch.nn.Module, name: str) -> Divergence:
        return divergence(self._logits, model, tracked(self._batches, f"measuring {name}", "batches"))

    def _placement(self, folder: Path) -> dict[str, Any]:
        """Where a model's layers go, for `from_pretrained`."""
        config, device = AutoConfig.from_pretrained(folder, trust_remote_code=self._trust_remote_code), self._device
        if hasattr(config, "quantization_config") or device.type not in ("cuda", "cpu"):
            return {"device_map": {"": device}}  # 4 bits fit where the stack did
        memory: dict[int | str, int] = {}
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            memory[torch.cuda.current_device() if device.index is None else device.index] = int(MERGED_WEIGHTS * free)
        memory["cpu"] = int(MERGED_WEIGHTS * available_ram())
        return {"device_map": "auto", "max_memory": memory}
