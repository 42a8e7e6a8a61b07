"""What a run leaves behind besides its stack: one combined adapter, one merged model, each measured."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from tuna_peft.export.check import check_exports
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.merge import merge_stack
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.inputs import Inputs

DIVERGENCE_PROMPTS = "divergence_prompts.json"

logger = logging.getLogger("tuna_peft")


def export_stack(run: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """Combines and merges as the recipe says, and measures each export against the live stack.

    Returns:
        By export (`combined`, `merged`) what was written and its `divergence` on prompts of the run's data.
    """
    settings, stack = run.recipe.export, run.path / "stack"
    if (done := run.load("exports.json")) is not None:
        return done
    base = run.recipe.base
    device = "cpu" if run.processes.sharding else base.device  # no GPU may hold the whole
    where: dict[str, Any] = {"device": device, "trust_remote_code": base.trust_remote_code}
    exports: dict[str, Any] = {}
    if settings.combine:
        exports["combined"] = _as_dict(combine_stack(stack, run.path / "combined", rank=settings.combine_rank))
    if settings.merge.enabled:
        merge = settings.merge
        exports["merged"] = _as_dict(
            merge_stack(stack, run.path / "merged", dtype=merge.dtype, base=merge.base, load_dtype=base.dtype, **where)
        )
    if settings.gguf:
        from tuna_peft.export.gguf.model import export_gguf  # needs an optional package

        exports["gguf"] = _as_dict(
            export_gguf(run.path / "merged", run.path / "gguf", types=settings.gguf, name=run.recipe.name)
        )
    prompts = divergence_prompts(inputs, settings.divergence_prompts)
    run.save(DIVERGENCE_PROMPTS, prompts)  # a later `tuna-peft merge` measures on the same
    if exports and prompts:
        folders = {name: run.path / name for name in exports if name != "gguf"}  # llama.cpp measures those
        measured = check_exports(stack, folders.values(), prompts, dtype=base.dtype, **where)
        for name, folder in folders.items():
            found = measured[str(folder)]
            exports[name]["divergence"] = dataclasses.asdict(found)
            logger.info("%s: KL divergence from the stack: %s", name, found)
    run.save("exports.json", exports)
    return exports


def divergence_prompts(inputs: Inputs, count: int) -> list[list[int]]:
    """Prompts with their best response, from the held-out data where there is some, else from the last stage's."""
    rows = inputs.ranked if inputs.ranked is not None else list(inputs.stages.values())[-1]
    picked = rows.select(range(min(count, len(rows))))
    if "input_ids" in rows.column_names:
        return list(picked["input_ids"])
    return [row["prompt_ids"] + row["completions_ids"][0] for row in picked]


def _as_dict(report: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(report), "path": report.path.name}
