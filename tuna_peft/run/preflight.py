"""The plan of a run against the machine that it is on: before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.planning.advice import advise
from tuna_peft.planning.from_recipe import require_native_bf16, run_spec, this_device
from tuna_peft.planning.gpus import GIB
from tuna_peft.planning.lengths import encoded_workload, records_workload
from tuna_peft.planning.plan import Plan, make_plan
from tuna_peft.planning.shapes import ModelShape, UnplannedModel
from tuna_peft.planning.workloads import prompt_workload
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.inputs import Inputs

logger = logging.getLogger("tuna_peft")


def preflight(
    recipe: Recipe,
    inputs: Inputs,
    config: PretrainedConfig,
    processes: int = 1,
    *,
    sharded: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ranked: Container[str] = (),
) -> Plan | None:
    """Says what the run will take; stops it where even its smallest forward passes do not fit.

    A peak beyond the memory is a warning only: a ranking step that runs out of memory is split by itself.

    Args:
        inputs: The data, encoded: lengths are exact. Responses that are still to be drawn are as long as they may be.
        config: The model's configuration.
        sharded: The processes share one base; the planner only knows whole ones.
        tokenizer: For prompts that the run makes rows of; None counts characters.
        ranked: Stages whose rows a run before this one has made: their teacher or judge is not needed any more.

    Returns:
        The plan; None for a model that the planner does not know, or that is sharded.

    Raises:
        UserError: It cannot fit, with what to change; bf16 is asked of a GPU that has none; or there is no such
            teacher or judge.
    """
    device = this_device(recipe.base.device)
    require_native_bf16(recipe, device.name, has_bf16=device.bf16)
    if sharded:
        logger.info("no plan: the planner knows whole bases, and this one is sharded over %d processes", processes)
        return None
    try:
        shape = ModelShape.from_config(config.to_dict(), recipe.base.model)
        workloads = {name: encoded_workload(rows) for name, rows in inputs.stages.items()}
        for stage in resolve_stages(recipe):
            if stage.feedback:
                prompts = records_workload(inputs.prompts[stage.name], tokenizer)
                workloads[stage.name] = prompt_workload(stage, prompts)
        if inputs.ranked is not None:
            workloads["evaluation.ranking"] = encoded_workload(inputs.ranked)  # generation finds its batch by itself
        plan = make_plan(run_spec(recipe, shape, workloads, device, processes, ranked), device)
    except UnplannedModel as error:
        logger.info("no plan: %s", error.what)
        return None
    worst = max(plan.phases, key=lambda phase: phase.smallest)
    if worst.smallest > device.memory:
        raise UserError(
            f"this cannot fit: {worst.name} needs {worst.smallest / GIB:.2f} GiB at least, "
            f"and {device.name} has {device.memory / GIB:.2f} GiB free",
            where=recipe.base.model,
            fix=_remedy(plan),
        )
    if plan.fits:
        logger.info("planned peak: %.2f of %.2f GiB (%s)", plan.peak / GIB, device.memory / GIB, device.name)
    else:
        logger.warning(
            "%s may take %.2f GiB and %s has %.2f free. %s",
            plan.largest.name, plan.needed / GIB, device.name, device.memory / GIB, _remedy(plan),
        )  # fmt: skip
    return plan


def _remedy(plan: Plan) -> str:
    changes = advise(plan)
    overrides: list[Any] = [override for change in changes for override in change.overrides]
    if changes and changes[-1].fits:
        return "To make it fit: " + " ".join(overrides)
    return "Take a smaller model or a larger GPU; `tuna-peft plan RECIPE --gpu all` shows which."
