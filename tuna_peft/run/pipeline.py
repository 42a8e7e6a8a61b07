"""Runs a recipe: base, stages, evaluation, export; goes on where an interrupted run stopped."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tuna_peft.evaluation.report.build import FACTS
from tuna_peft.evaluation.report.write import write_report
from tuna_peft.evaluation.session import JOURNAL, Session
from tuna_peft.graders import load_grader
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import (
    Base,
    load_base,
    load_config_and_tokenizer,
    make_quantization_config,
    resolve_device,
    resolve_dtype,
)
from tuna_peft.models.base.memory import free_memory
from tuna_peft.models.base.shards import shard_base
from tuna_peft.models.stack.adapters import drop_adapter, fingerprint, load_adapter
from tuna_peft.models.stack.any_model import model_digest
from tuna_peft.models.stack.files import extend_stack
from tuna_peft.models.stack.manifest import read_manifest
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages, stage_names
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.evaluate import evaluate_stage
from tuna_peft.run.exports import export_stack
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.inputs import Inputs, read_inputs
from tuna_peft.run.measure import environment
from tuna_peft.run.preflight import preflight
from tuna_peft.run.processes import Processes
from tuna_peft.run.publish import publish, require_exports
from tuna_peft.run.rank_samples import check_feedback, is_ranked, make_rows
from tuna_peft.run.sharding import require_shardable
from tuna_peft.run.train_stage import stage_config, train_stage

logger = logging.getLogger("tuna_peft")


def run_recipe(recipe: Recipe, output: str | Path) -> dict[str, Any]:
    """Runs `recipe` in the folder `output`, or what of it is not done there yet.

    Under a launcher every process calls this, see `tuna_peft.run.processes`.

    Returns:
        The report, as written to `output/report.json`, see `tuna_peft.evaluation.report.build`; in all but the first
        process an empty one.

    Raises:
        UserError: Bad data, model or output folder; before anything is trained where it can be known.
        KeyboardInterrupt: Ctrl-C; the same call goes on later.
    """
    on_cpu = resolve_device(recipe.base.device).type == "cpu"
    processes = Processes(on_cpu)
    if processes.sharding:
        require_shardable(recipe)
    with RunDirectory(output, recipe, processes) as run:
        _quieten_libraries()
        stages = resolve_stages(recipe)
        for stage in stages:
            stage_config(recipe, stage, run.stage_folder(stage.name), on_cpu=on_cpu)  # fields that conflict
        if recipe.evaluation and recipe.evaluation.tasks.graded:
            load_grader(recipe.evaluation.tasks.graded.grader, "evaluation.tasks.graded.grader")
        config, tokenizer = load_config_and_tokenizer(
            recipe.base.model, revision=recipe.base.revision, trust_remote_code=recipe.base.trust_remote_code
        )
        require_exports(recipe, config, tokenizer)
        with processes.main_first():
            inputs = read_inputs(recipe, tokenizer, config)
        for stage in stages:
            if stage.feedback:
                check_feedback(stage, inputs.prompts[stage.name], tokenizer)
        sharded, ranked = processes.sharding is not None, [name for name in inputs.prompts if is_ranked(run, name)]
        preflight(recipe, inputs, config, processes.count, sharded=sharded, tokenizer=tokenizer, ranked=ranked)
        base = _load_base(recipe, processes)
        run.save(FACTS, _facts(recipe, base, inputs))
        model: PreTrainedModel | PeftModel = base.model
        _evaluate(run, model, base, inputs, "base")
        for stage in stages:
            if stage.feedback:
                with processes.main_first(model):  # the others find what it made
                    make_rows(run, model, base, inputs, stage)
                run.save(FACTS, _facts(recipe, base, inputs))
            model = _finish_stage(run, model, base, inputs, stage)
            _evaluate(run, model, base, inputs, stage.name)
        del model, base
        free_memory()  # for the exports, which are measured one after the other
        report = _finish(run, inputs) if processes.main else {}
        processes.wait()
        return report


def _finish(run: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """What the first process does when all stages are trained."""
    export_stack(run, inputs)
    report = write_report(run.path)
    publish(run)
    return report


def _quieten_libraries() -> None:
    """Their bars and warnings would bury ours; warnings still go to run.log."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_default_handler()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _load_base(recipe: Recipe, processes: Processes) -> Base:
    settings, quantization, sharding = recipe.base, recipe.quantization, processes.sharding
    device = resolve_device(settings.device)
    held = resolve_dtype(settings.dtype, device)
    compute = held if quantization.compute_dtype == "auto" else resolve_dtype(quantization.compute_dtype)
    mesh = init_device_mesh(device.type, (processes.count,)) if sharding else None
    logger.info("loading %s, %s", settings.model, quantization.method)
    with processes.in_turn() if sharding and sharding.in_turn else contextlib.nullcontext():
        base = load_base(
            settings.model,
            revision=settings.revision,
            quantization_config=make_quantization_config(
                quantization.method,
                double_quant=quantization.double_quant,
                compute_dtype=compute,
                storage_dtype=compute if sharding else torch.uint8,
            ),
            dtype=str(held).removeprefix("torch."),
            device="cpu" if sharding else str(device),  # no GPU may hold the whole
            trust_remote_code=settings.trust_remote_code,
        )
        if sharding and mesh:
            shard_base(base.model, mesh, layers=sharding.layers, reshard_after_forward=sharding.reshard_after_forward)
            logger.info("sharded over %d processes", processes.count)
    return base


def _finish_stage(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, inputs: Inputs, stage: ResolvedStage
) -> PeftModel:
    """The model with the stage's adapter on top: loaded if it was trained before, else trained now."""
    stack = run.path / "stack"
    if run.load(f"stages/{stage.name}/done.json") is not None:
        # Once its successor is being written, the manifest may name that one instead.
        if stage.replaced_by is None or not (stack / stage.replaced_by).exists():
            read_manifest(stack, upto=stage.name)  # verifies hashes
        logger.info("stage %s is done", stage.name)
        loaded = load_adapter(model, stage.name, stack / stage.name)
        if stage.replaces is not None:
            drop_adapter(loaded, stage.replaces)
        return loaded
    frozen = {name: fingerprint(model, name) for name in stage.below}
    logger.info("stage %s: %s on %d rows", stage.name, stage.type, len(inputs.stages[stage.name]))
    trained, summary = train_stage(
        model, base.tokenizer, inputs.stages[stage.name], run.recipe, stage, run.stage_folder(stage.name)
    )
    changed = [name for name, before in frozen.items() if fingerprint(trained, name) != before]
    if changed:
        raise RuntimeError(f"stage {stage.name} changed the frozen adapters {changed}")
    if run.processes.main:
        extend_stack(trained, stack, run.recipe.prompt.model_dump())
        run.save(f"stages/{stage.name}/done.json", summary)
    run.processes.wait()
    return trained


def _evaluate(run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, inputs: Inputs, stage: str) -> None:
    settings = run.recipe.evaluation
    with run.processes.main_first(model):
        if settings and inputs.tasks and run.processes.main:
            with Journal(run.path / JOURNAL) as journal:
                session = Session(
                    run.path, stage, model_digest(model), model, base.tokenizer, journal, settings.batch_size
                )
                evaluate_stage(session, inputs.tasks)


def _facts(recipe: Recipe, base: Base, inputs: Inputs) -> dict[str, Any]:
    """What the report says of a run beside what its stages leave behind."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "base": {**base.identity, "quantization": recipe.quantization.model_dump()},
        "stages": stage_names(recipe)[1:],
        "data": inputs.counts,
        "environment": environment(),
    }
