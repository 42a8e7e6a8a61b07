"""The plan of a run against the machine that it is on: before any weight is loaded."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PretrainedConfig

from tuna_peft.errors import UserError
from tuna_peft.planning.advice import advise
from tuna_peft.planning.gpus import GIB
from tuna_peft.planning.plan import Plan, make_plan
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ASSUMED_RESPONSES, ASSUMED_ROWS, Workload
from tuna_peft.recipe.inputs import Inputs
from tuna_peft.recipe.lengths import encoded_workload
from tuna_peft.recipe.plan import require_native_bf16, run_spec, this_device
from tuna_peft.recipe.schema import Recipe

logger = logging.getLogger("tuna_peft")


def preflight(
    recipe: Recipe, inputs: Inputs, config: PretrainedConfig, processes: int = 1, *, sharded: bool = False
) -> Plan | None:
    """Says what the run will take; stops it where even its smallest forward passes do not fit.

    A peak beyond the memory is a warning only: a ranking step that runs out of memory is split by itself.

    Args:
        inputs: The data, encoded: lengths are exact. A stage whose data is still to be made gets typical ones.
        config: The model's configuration.
        sharded: The processes share one base; the planner only knows whole ones.

    Returns:
        The plan; None for a model that the planner does not know, or that is sharded.

    Raises:
        UserError: It cannot fit, with what to change; or bf16 is asked of a GPU that has none.
    """
    device = this_device(recipe.base.device)
    require_native_bf16(recipe, device.name, has_bf16=device.bf16)
    if sharded:
        logger.info("no plan: the planner knows whole bases, and this one is sharded over %d processes", processes)
        return None
    try:
        shape = ModelShape.from_config(config.to_dict(), recipe.base.model)
    except UserError as error:
        logger.info("no plan: %s", error.what)
        return None
    workloads = {
        stage.name: Workload.assumed(ASSUMED_RESPONSES, stage.train.get("max_length", 1024), ASSUMED_ROWS)
        for stage in recipe.trained()
    }
    workloads |= {name: encoded_workload(rows) for name, rows in inputs.stages.items()}
    if inputs.ranked is not None:
        workloads["evaluation.ranking"] = encoded_workload(inputs.ranked)  # generation finds its batch by itself
    plan = make_plan(run_spec(recipe, shape, workloads, device, processes), device)
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
