"""The exports of a run: checked before training, written and measured after it, published last.

`tuna_peft.run.pipeline` calls these three steps. What is exported, apart from the stack of adapters itself: one
combined adapter, one merged model, and GGUF files of the merged model.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.export.base_weight import require_linear
from tuna_peft.export.check import check_exports
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.hub import push, require_token
from tuna_peft.export.loading import UNQUANTIZED
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.release import public_base
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.inputs import Inputs

DIVERGENCE_PROMPTS = "divergence_prompts.json"
PUSHED = "pushed.json"

logger = logging.getLogger("tuna_peft")


def require_exports(
    recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, trial: PeftModel
) -> None:
    """Checks, before anything is trained, that the exports at the end of the run can be made.

    Args:
        config: The configuration of the base.
        tokenizer: The tokenizer of the base.
        trial: The base with the adapters of all stages, without weights.

    Raises:
        UserError: A layer cannot be merged, a package is missing, llama.cpp cannot run the base, there is no token for
            the Hub, or the base is a local folder and the recipe does not say what it is called on the Hub.
    """
    settings = recipe.export
    if settings.merge.enabled:
        base = trial.get_base_model()
        require_linear(base, [name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)])
    if settings.gguf:
        from tuna_peft.export.gguf import require_gguf

        require_gguf()
        from tuna_peft.export.gguf.model import require_exportable  # imports the optional package `gguf`

        require_exportable(config, tokenizer)
    if settings.push is not None:
        require_token()
        public_base(settings.push.what, recipe.base.model, settings.push.base_id)


def export_stack(run: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """Combines and merges the stack as the recipe says, and measures each export against the unmerged adapters.

    Returns:
        For each export (`combined`, `merged`, `gguf/FILE`) what was written, and its `divergence` on prompts of the
        run's data; for comparison also the divergence of `BASE`, and of the combined adapter on an unquantized base.
    """
    settings, stack = run.recipe.export, run.path / "stack"
    if (done := run.load("exports.json")) is not None:
        return done
    base = run.recipe.base
    device = "cpu" if run.processes.sharding else base.device  # a sharded base may be too large for one GPU
    loading: dict[str, Any] = {"device": device, "trust_remote_code": base.trust_remote_code}
    exports: dict[str, Any] = {}
    if settings.combine:
        exports["combined"] = _as_dict(combine_stack(stack, run.path / "combined", rank=settings.combine_rank))
    if settings.merge.enabled:
        merge = settings.merge
        report = merge_stack(
            stack, run.path / "merged", dtype=merge.dtype, base=merge.base, load_dtype=base.dtype,
            allow_lost_update=True,  # a warning: the adapters are trained, and the recipe asks for this dtype
            **loading,
        )  # fmt: skip
        exports["merged"] = _as_dict(report)
    prompts = divergence_prompts(inputs, settings.divergence_prompts)
    run.save(DIVERGENCE_PROMPTS, prompts)  # `tuna-peft merge` measures on the same prompts later
    if settings.gguf:
        from tuna_peft.export.gguf.choose import export_gguf_of_stack  # both import the optional package `gguf`
        from tuna_peft.export.gguf.model import export_gguf

        options: dict[str, Any] = {"types": settings.gguf, "name": run.recipe.name, "allow_lost_update": True}
        if settings.gguf_base == "auto":
            written, _ = export_gguf_of_stack(stack, run.path / "gguf", prompts, device=device, **options)
        else:
            written = export_gguf(run.path / "merged", run.path / "gguf", stack_dir=stack, **options)
        exports["gguf"] = _as_dict(written)
        exports |= {f"gguf/{file}": {"path": f"gguf/{file}", "nbytes": size} for file, size in written.files.items()}
    if exports and prompts:
        folders = {name: run.path / name for name in exports if name != "gguf"}  # its files are measured
        names = {str(folder): name for name, folder in folders.items()}
        for path, measured in check_exports(stack, folders.values(), prompts, dtype=base.dtype, **loading).items():
            folder, on_unquantized, _ = path.partition(UNQUANTIZED)
            name = names.get(folder, folder) + on_unquantized
            exports.setdefault(name, {})["divergence"] = dataclasses.asdict(measured)
            logger.info("%s: KL divergence from the unmerged adapters: %s", name, measured)
    run.save("exports.json", exports)
    return exports


def divergence_prompts(inputs: Inputs, count: int) -> list[list[int]]:
    """Token ids of `count` prompts, each with its best response: held-out data, or else data of the last stage."""
    rows = inputs.ranked if inputs.ranked is not None else list(inputs.stages.values())[-1]
    selected = rows.select(range(min(count, len(rows))))
    if "input_ids" in rows.column_names:
        return list(selected["input_ids"])
    return [row["prompt_ids"] + row["completions_ids"][0] for row in selected]


def publish(run: RunDirectory) -> None:
    """Pushes to the Hub what the recipe names, once: `pushed.json` records that it is done.

    Raises:
        UserError: The Hub refuses it or cannot be reached; the run itself is complete.
    """
    settings = run.recipe.export.push
    if settings is None or run.load(PUSHED) is not None:
        return
    try:
        report = push(
            run.path, settings.repo, kind=settings.what, private=settings.private, revision=settings.revision,
            create_pr=settings.pull_request, base_id=settings.base_id, license=settings.license,
            data_license=settings.data_license,
        )  # fmt: skip
    except UserError as error:
        raise UserError(
            f"the run is complete, but was not published: {error.what}", where=error.where, fix=error.fix
        ) from error
    logger.info("published: %s", report.url)
    run.save(PUSHED, dataclasses.asdict(report))


def _as_dict(report: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(report), "path": report.path.name}
