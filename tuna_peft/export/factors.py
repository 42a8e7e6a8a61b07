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
from tuna_peft.models.stack.adapters import ADAPTER_WEIGHTS, require_stackable
from tuna_peft.models.stack.find import find_stack
from tuna_peft.models.stack.manifest import AdapterEntry, Manifest, read_manifest

PEFT_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


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
        config = LoraConfig.from_pretrained(str(folder))
        base = {"model": config.base_model_name_or_path, "revision": config.revision, "fingerprint": None}
        factors = cls.__new__(cls)
        factors._open(Path(folder), Manifest(base, None, [AdapterEntry.of(Path(folder), ".")]))
        return factors

    def _open(self, root: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = root, manifest
        self.shapes = {}
        self._adapters: list[_Adapter] = []
        for entry in manifest.adapters:
            folder = root / entry.path
            config = LoraConfig.from_pretrained(str(folder))
            require_stackable(config, entry.name)
            self._adapters.append(_Adapter(folder / ADAPTER_WEIGHTS, config, self._add_shapes(folder, entry.name)))

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
                parts_a.append(tensors.get_tensor(PEFT_PREFIX + module + _A).float())
                parts_b.append(tensors.get_tensor(PEFT_PREFIX + module + _B).float() * adapter.scaling(module))
        return Factors(torch.cat(parts_a, dim=0), torch.cat(parts_b, dim=1))

    def _add_shapes(self, folder: Path, name: str) -> dict[str, int]:
        """Adds an adapter's sizes to `shapes` and returns its rank per module."""
        ranks: dict[str, int] = {}
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            keys = set(tensors.keys())
            for key in sorted(keys):
                if not key.startswith(PEFT_PREFIX) or not key.endswith((_A, _B)):
                    raise UserError(
                        f"adapter {name!r} holds {key!r}, which is no LoRA factor of a linear layer",
                        where=str(folder),
                        fix="Only plain LoRA on linear layers can be combined or merged exactly.",
                    )
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if not key.endswith(_A):
                    continue
                module = key.removeprefix(PEFT_PREFIX).removesuffix(_A)
                rank, inputs = tensors.get_slice(key).get_shape()
                outputs, _ = tensors.get_slice(key.removesuffix(_A) + _B).get_shape()
                ranks[module] = rank
                below = self.shapes.get(module)
                self.shapes[module] = FactorShape(rank + (below.rank if below else 0), inputs, outputs)
        return ranks
