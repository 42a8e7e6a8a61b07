"""Every way out of a stack, written, measured and deleted again: what each costs in fidelity and in size."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuna_peft.errors import UserError
from tuna_peft.export.check import Comparison
from tuna_peft.export.combine import CombineReport, combine_stack
from tuna_peft.export.divergence import Divergence
from tuna_peft.export.factors import StackFactors
from tuna_peft.export.merge import MERGED_DTYPES, MergeReport, merge_stack
from tuna_peft.models.stack.find import find_stack
from tuna_peft.models.stack.manifest import read_manifest


@dataclass(frozen=True)
class Route:
    """One way out.

    Attributes:
        name: What is written, for example `dequantized, bfloat16`.
        nbytes: Size of its weights; None for the base alone and for a closed route.
        divergence: From the live stack; None where the route is closed.
        reason: Why it is closed.
    """

    name: str
    nbytes: int | None
    divergence: Divergence | None
    reason: str | None = None


def compare_routes(
    stack_dir: str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    work_dir: str | os.PathLike[str],
    *,
    upto: str | None = None,
    base_model: str | None = None,
    device: str = "auto",
) -> Iterator[Route]:
    """The base alone, the combined adapter (all of its rank, and half), merged models of either base in every dtype.

    Args:
        stack_dir: The folder with `stack.json`, a run's folder, or a Hub id.
        prompts: Token ids of each prompt.
        work_dir: Holds one export at a time while it is measured.
        upto, base_model, device: As in `merge_stack`.

    Raises:
        UserError: A broken or empty stack, another base, no prompts.
    """
    source = find_stack(stack_dir)
    comparison = Comparison(source, prompts, upto=upto, base_model=base_model, device=device)
    yield Route("base without the stack", None, comparison.base())

    full = max(shape.rank for shape in StackFactors(source, upto).shapes.values())
    half = -(-full // 2)
    for name, rank in ((f"adapter, rank {full}", None), (f"adapter, rank {half}", half)):
        write = partial(combine_stack, source, upto=upto, rank=rank)
        yield _measured(name, work_dir, write, comparison.adapter)
    quantised = read_manifest(source).quantization is not None
    for base in ("dequantized", "original") if quantised else ("original",):
        for dtype in MERGED_DTYPES:
            merge = partial(merge_stack, base=base, dtype=dtype, upto=upto, base_model=base_model, device=device)
            yield _measured(f"{base}, {dtype}", work_dir, partial(merge, source), comparison.model)


def _measured(
    name: str,
    work_dir: str | os.PathLike[str],
    write: Callable[[Path], CombineReport | MergeReport],
    measure: Callable[[Path], Divergence],
) -> Route:
    with tempfile.TemporaryDirectory(prefix=".compare.", dir=work_dir) as folder:
        out = Path(folder) / "export"
        try:
            return Route(name, write(out).nbytes, measure(out))
        except UserError as error:  # no space, beyond float16's range ..: the others may still be open
            return Route(name, None, None, error.what)
