"""A run from beginning to end: check and read everything, load the base, train stage by stage, export.

`tuna-peft run` calls `run_recipe`. Each step saves its result in the run's folder (`tuna_peft.run.folder`) and is
skipped if the result is there already, so the same call resumes an interrupted run.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tuna_peft.data.texts import set_template_date
from tuna_peft.evaluation.report.write import write_report
from tuna_peft.evaluation.results import RUN_INFO
from tuna_peft.evaluation.session import JOURNAL, Session
from tuna_peft.graders import load_grader
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import (
    Base,
    load_base,
    make_quantization_config,
    resolve_device,
    resolve_dtype,
)
from tuna_peft.models.base.memory import free_memory
from tuna_peft.models.base.shards import shard_base
from tuna_peft.models.stack.adapters import active_adapters, drop_adapter, fingerprint, load_adapter
from tuna_peft.models.stack.any_model import model_digest
from tuna_peft.models.stack.files import extend_stack
from tuna_peft.models.stack.manifest import read_manifest
from tuna_peft.planning.command_sizes import batch_size
from tuna_peft.planning.prompt_check import warn_of_default_template
from tuna_peft.planning.sizes import sizes_of
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages, stage_names
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.checks import check_base, check_options
from tuna_peft.run.evaluate import evaluate_stage
from tuna_peft.run.exports import export_stack, publish
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.inputs import Inputs, read_inputs
from tuna_peft.run.machines import require_same_data
from tuna_peft.run.measure import environment
from tuna_peft.run.preflight import preflight
from tuna_peft.run.processes import Processes
from tuna_peft.run.rank_samples import check_feedback, is_ranked, rank_samples, read_ranked
from tuna_peft.run.sharding import require_shardable
from tuna_peft.run.trackers import track_report
from tuna_peft.run.train_stage import train_stage

logger = logging.getLogger("tuna_peft")


def run_recipe(recipe: Recipe, output: str | Path) -> dict[str, Any]:
    """Runs `recipe` in the folder `output`, or what is not done there yet.

    Under a launcher (`accelerate launch`, `torchrun`) every process calls this, see `tuna_peft.run.processes`.

    Returns:
        The report, as written to `output/report.json`, see `tuna_peft.evaluation.report.build`. In all processes but
        the first one it is empty.

    Raises:
        UserError: The data, the model or the output folder cannot be used. Whatever can be checked without the model's
            weights is checked before any of them is loaded.
        KeyboardInterrupt: After Ctrl-C; the same call resumes the run.
    """
    on_cpu = resolve_device(recipe.base.device).type == "cpu"
    processes = Processes(on_cpu)
    if processes.sharding:
        require_shardable(recipe)
    with processes.end_together(), RunDirectory(output, recipe, processes) as run:
        _quiet_libraries()
        stages = resolve_stages(recipe)
        inputs = _check_and_read(run, stages, on_cpu)
        stages = resolve_stages(run.recipe)  # with the sizes that follow the memory
        base = _load_base(run.recipe, processes)
        set_template_date(base.tokenizer, run.recipe.prompt.date)
        run.save(RUN_INFO, _facts(run.recipe, base, inputs))

        model: PreTrainedModel | PeftModel = base.model
        _evaluate(run, model, base, inputs, "base")
        for stage in stages:
            if stage.feedback:
                tasks = len(inputs.tasks)
                with active_adapters(model, stage.samples_from), run.main_first(model):
                    if processes.main:
                        rank_samples(run, model, base, inputs, stage)
                read_ranked(run, base, inputs, stage)
                run.save(RUN_INFO, _facts(run.recipe, base, inputs))  # with the counts of the new rows
                if len(inputs.tasks) > tasks:  # a task that the base and the stages below could not have yet
                    for count, name in enumerate(("base", *stage.below)):
                        with active_adapters(model, stage.below[:count]):
                            _evaluate(run, model, base, inputs, name, stage.below[:count])
            model = _finish_stage(run, model, base, inputs, stage)
            _evaluate(run, model, base, inputs, stage.name)

        del model, base
        free_memory()  # an export is as large as the base, and is loaded to be measured
        report: dict[str, Any] = {}
        if processes.main:
            export_stack(run, inputs)
            report = write_report(run.path)
            track_report(run, report)
            publish(run)
        processes.wait()
        return report


def _quiet_libraries() -> None:
    """Switches off progress bars and warnings of the libraries, which would hide ours; run.log keeps the warnings.

    Bars of downloads stay on a terminal: nothing else tells how long they take.
    """
    shows_downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_default_handler()
    transformers_logging.disable_progress_bar()  # those of huggingface_hub, too
    if shows_downloads:
        enable_progress_bars()
    datasets.disable_progress_bars()


def _check_and_read(run: RunDirectory, stages: list[ResolvedStage], on_cpu: bool) -> Inputs:
    """Everything that can fail without the model's weights, so that a mistake costs seconds and not hours.

    Returns:
        All data of the recipe, encoded.
    """
    recipe, processes = run.recipe, run.processes
    check_options(recipe, stages, run.path, on_cpu=on_cpu)
    if recipe.named_evaluation and (graded := recipe.named_evaluation.tasks.graded):
        load_grader(graded.grader, "evaluation.tasks.graded.grader")
    config, tokenizer = check_base(recipe, stages)
    warn_of_default_template(recipe, tokenizer)
    with run.main_first():  # the first process downloads, the others read its cache
        run.fix_template_date(tokenizer)
        run.fix_dtype(config)
        run.fix_sizes()
        inputs = read_inputs(recipe, tokenizer, config)
    require_same_data(processes, run.recipe, inputs)
    if processes.sharding and recipe.evaluation == "auto":  # generation gathers the shards for every token: too slow
        inputs.tasks = [task for task in inputs.tasks if task.name != "answers"]
    for stage in stages:
        if stage.feedback:
            check_feedback(stage, inputs.prompts[stage.name], tokenizer)
    ranked = [name for name in inputs.prompts if is_ranked(run, name)]
    sharded = processes.sharding is not None
    plan = preflight(run.recipe, inputs, config, processes.count, sharded=sharded, tokenizer=tokenizer, ranked=ranked)
    if plan:
        with run.main_first():  # whose memory counts
            run.fix_sizes(sizes_of(plan.run))
    return inputs


def _load_base(recipe: Recipe, processes: Processes) -> Base:
    """The base model, frozen; if the processes share one base, each keeps only its shard."""
    settings, quantization, sharding = recipe.base, recipe.quantization, processes.sharding
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    compute_dtype = dtype if quantization.compute_dtype == "auto" else resolve_dtype(quantization.compute_dtype)
    mesh = init_device_mesh(device.type, (processes.count,)) if sharding else None
    logger.info("loading %s, %s", settings.model, quantization.method)
    with processes.in_turn() if sharding and sharding.in_turn else contextlib.nullcontext():
        base = load_base(
            settings.model,
            revision=settings.revision,
            quantization_config=make_quantization_config(
                quantization.method,
                double_quant=quantization.double_quant,
                compute_dtype=compute_dtype,
                storage_dtype=compute_dtype if sharding else torch.uint8,  # FSDP2 shards floating-point tensors only
            ),
            dtype=str(dtype).removeprefix("torch."),
            device="cpu" if sharding else str(device),  # the whole base may be too large for one GPU
            trust_remote_code=settings.trust_remote_code,
        )
        if sharding and mesh:
            shard_base(base.model, mesh, layers=sharding.layers, reshard_after_forward=sharding.reshard_after_forward)
            logger.info("sharded over %d processes", processes.count)
    return base


def _finish_stage(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, inputs: Inputs, stage: ResolvedStage
) -> PeftModel:
    """The model with the stage's adapter on top: loaded if the stage is finished, otherwise trained now.

    Raises:
        UserError: A finished stage's files were changed: their hashes differ from those in `stack.json`.
    """
    stack = run.path / "stack"
    if run.load(f"stages/{stage.name}/done.json") is not None:
        # When a later round has taken this one's place, `stack.json` may name that one instead.
        if stage.replaced_by is None or not (stack / stage.replaced_by).exists():
            read_manifest(stack, upto=stage.name)  # verifies the hashes
        logger.info("stage %s is done", stage.name)
        loaded = load_adapter(model, stage.name, stack / stage.name)
        if stage.replaces is not None:
            drop_adapter(loaded, stage.replaces)
        return loaded
    rows = inputs.stages[stage.name]
    before = {name: fingerprint(model, name) for name in stage.below}
    logger.info("stage %s: %s on %d rows", stage.name, stage.type, len(rows))
    trained, summary = train_stage(model, base.tokenizer, rows, run.recipe, stage, run.stage_folder(stage.name))
    # The results of earlier stages hold only if training left their adapters as they were.
    changed = [name for name, hashed in before.items() if fingerprint(trained, name) != hashed]
    if changed:
        raise RuntimeError(f"stage {stage.name} changed the frozen adapters {changed}")
    if run.processes.main:
        extend_stack(trained, stack, run.recipe.prompt.model_dump())
        run.save(f"stages/{stage.name}/done.json", summary)  # last: the stage counts as finished from here on
    run.processes.wait()
    return trained


def _evaluate(
    run: RunDirectory,
    model: PreTrainedModel | PeftModel,
    base: Base,
    inputs: Inputs,
    stage: str,
    adapters: Sequence[str] | None = None,
) -> None:
    """Runs the recipe's tasks on `model` in the first process; the others compute a part, or lend it their shards.

    Args:
        adapters: Those that are active, if not all are.
    """
    with run.main_first(model):
        if inputs.tasks and run.processes.main:
            with Journal(run.path / JOURNAL) as journal:
                named = run.recipe.named_evaluation
                size = batch_size(named.batch_size if named else "auto", model)
                session = Session(run.path, stage, model_digest(model, adapters), model, base.tokenizer, journal, size)
                evaluate_stage(session, inputs.tasks)


def _facts(recipe: Recipe, base: Base, inputs: Inputs) -> dict[str, Any]:
    """`run.json`: what the report says about the run besides the results of its stages."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "base": {**base.identity, "quantization": recipe.quantization.model_dump()},
        "stages": stage_names(recipe)[1:],
        "prompt": recipe.prompt.model_dump(),
        "data": inputs.counts,
        "environment": environment(),
    }
