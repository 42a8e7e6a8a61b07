"""The low-rank factors of a stack, read from its files. `combine`, `merge` and `gguf` use them.

Every adapter adds `scaling * B A x` to the output of a module, so the whole stack adds

    [s_1 B_1 | s_2 B_2 | ..] [A_1; A_2; ..] x

which is a single adapter whose rank is the sum of the ranks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from tuna_peft.errors import UserError
from tuna_peft.models.stack.adapters import (
    ADAPTER_WEIGHTS,
    LORA_A,
    LORA_B,
    PEFT_PREFIX,
    read_adapter,
    require_stackable,
)
from tuna_peft.models.stack.find import find_stack
from tuna_peft.models.stack.manifest import AdapterEntry, Manifest, read_manifest


@dataclass(frozen=True)
class Factors:
    """The stack's factors for one module, in fp32, with each adapter's scaling multiplied into `b`.

    Attributes:
        a: `(rank, in)`, the adapters' A concatenated by rows.
        b: `(out, rank)`, the adapters' scaled B concatenated by columns.
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class FactorShape:
    """The sizes of one module's `Factors`."""

    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class _Adapter:
    file: Path
    config: LoraConfig
    ranks: dict[str, int]

    def scaling(self, module: str) -> float:
        """What PEFT multiplies `B A x` with; its patterns match the ends of module names."""
        alphas = self.config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), module), self.config.lora_alpha)
        rank = self.ranks[module]
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


class StackFactors:
    """A verified stack's factors, read from the files module by module.

    Attributes:
        folder: The stack's local folder, see `find_stack`.
        manifest: The stack's manifest up to `upto`.
        shapes: The sizes for every module that an adapter targets, in order of appearance.

    Raises:
        UserError: A broken stack, or an adapter that is not plain LoRA on linear layers.
    """

    folder: Path
    manifest: Manifest
    shapes: dict[str, FactorShape]

    def __init__(self, stack_dir: str | os.PathLike[str], upto: str | None = None):
        folder = find_stack(stack_dir)
        self._open(folder, read_manifest(folder, upto))

    @classmethod
    def of_adapter(cls, folder: str | os.PathLike[str]) -> StackFactors:
        """A folder with one plain PEFT adapter (a combined one, for example), read as a stack of one."""
        config, _ = read_adapter(Path(folder), Path(folder).name)
        base = {"model": config.base_model_name_or_path, "revision": config.revision, "fingerprint": None}
        factors = cls.__new__(cls)
        factors._open(Path(folder), Manifest(base, None, [AdapterEntry.of(Path(folder), ".")]))
        return factors

    def _open(self, root: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = root, manifest
        self.shapes = {}
        self._adapters: list[_Adapter] = []
        for entry in manifest.adapters:
            self._add(root / entry.path, entry.name)

    @property
    def configs(self) -> list[LoraConfig]:
        """The adapters' configurations from bottom to top."""
        return [adapter.config for adapter in self._adapters]

    def of(self, module: str) -> Factors:
        """Reads the factors of one of the modules in `shapes`."""
        parts_a, parts_b = [], []
        for adapter in self._adapters:
            if module not in adapter.ranks:
                continue
            with safe_open(adapter.file, framework="pt") as tensors:
                parts_a.append(tensors.get_tensor(PEFT_PREFIX + module + LORA_A).float())
                parts_b.append(tensors.get_tensor(PEFT_PREFIX + module + LORA_B).float() * adapter.scaling(module))
        return Factors(torch.cat(parts_a, dim=0), torch.cat(parts_b, dim=1))

    def _add(self, folder: Path, name: str) -> None:
        """Adds an adapter and its sizes."""
        config, shapes = read_adapter(folder, name)
        require_stackable(config, name)
        for key in sorted(shapes):
            if not key.startswith(PEFT_PREFIX) or not key.endswith((LORA_A, LORA_B)) or len(shapes[key]) != 2:
                raise UserError(
                    f"adapter {name!r} holds {key!r}, which is no LoRA factor of a linear layer",
                    where=str(folder),
                    fix="Only plain LoRA on linear layers can be combined or merged exactly.",
                )
        ranks: dict[str, int] = {}
        for key, (rank, inputs) in shapes.items():
            if key.endswith(LORA_A):
                module = key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)
                outputs, _ = shapes[key.removesuffix(LORA_A) + LORA_B]
                ranks[module] = rank
                below = self.shapes.get(module)
                if below and (below.inputs, below.outputs) != (inputs, outputs):
                    what = f"adapter {name!r} is for another base than those below it: {module} has other sizes"
                    raise UserError(what, where=str(folder), fix="Copy the whole stack again.")
                self.shapes[module] = FactorShape(rank + (below.rank if below else 0), inputs, outputs)
        self._adapters.append(_Adapter(folder / ADAPTER_WEIGHTS, config, ranks))
