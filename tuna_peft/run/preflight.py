"""Checks before any weight is loaded that a run fits into this machine's memory.

`tuna_peft.run.pipeline` calls it with the data already read, so the plan knows the exact lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.limits import GIB
from tuna_peft.planning.advice import advise
from tuna_peft.planning.from_recipe import require_native_bf16, run_spec, this_device
from tuna_peft.planning.lengths import encoded_workload, prompt_workload, records_workload
from tuna_peft.planning.plan import Plan, make_plan
from tuna_peft.planning.shapes import ModelShape, UnplannedModel
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
    """Logs the planned peak memory of the run, and stops it if not even its smallest forward passes fit.

    A planned peak above the free memory is only a warning: a ranking step that runs out of memory is split
    automatically.

    Args:
        inputs: The encoded data, whose lengths are exact. For responses that are not sampled yet the plan assumes the
            maximum length.
        config: The configuration of the base.
        processes: Number of processes of the run.
        sharded: Whether the processes share one base; there is no plan then.
        tokenizer: Counts the tokens of prompts that are not encoded yet; None estimates from characters.
        ranked: Stages that an interrupted run has ranked already: their teacher or judge is not loaded again.

    Returns:
        The plan; None if the base is sharded or of a type that the planner does not know.

    Raises:
        UserError: The run cannot fit (the message says what to change), the recipe requests bf16 on a GPU without it,
            or a local teacher or judge does not exist.
    """
    device = this_device(recipe.base.device)
    require_native_bf16(recipe, device.name, has_bf16=device.bf16 or not device.cuda)
    if sharded:
        logger.info("no memory plan: the planner does not support a base that is sharded over %d processes", processes)
        return None
    try:
        shape = ModelShape.from_config(config.to_dict(), recipe.base.model)
        workloads = {name: encoded_workload(rows) for name, rows in inputs.stages.items()}
        for stage in resolve_stages(recipe):
            if stage.feedback:
                prompts = records_workload(inputs.prompts[stage.name], tokenizer)
                workloads[stage.name] = prompt_workload(stage, prompts)
        if inputs.ranked is not None:
            workloads["evaluation.ranking"] = encoded_workload(inputs.ranked)  # generation adapts its batch size
        plan = make_plan(run_spec(recipe, shape, workloads, device, processes, ranked), device)
    except UnplannedModel as error:
        logger.info("no memory plan: %s", error.what)
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
            "%s may need %.2f GiB and %s has %.2f GiB free. %s",
            plan.largest.name, plan.needed / GIB, device.name, device.memory / GIB, _remedy(plan),
        )  # fmt: skip
    return plan


def _remedy(plan: Plan) -> str:
    """What to change in the recipe to make the run fit, as overrides for the command line."""
    changes = advise(plan)
    overrides: list[Any] = [override for change in changes for override in change.overrides]
    if changes and changes[-1].fits:
        return "To make it fit: " + " ".join(overrides)
    return "Take a smaller model or a larger GPU; `tuna-peft plan RECIPE --gpu all` shows which."
