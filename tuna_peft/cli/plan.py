"""`tuna-peft plan`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tuna_peft.terminal import console, echo


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, for example base.model=Qwen/Qwen3-8B.", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help='For example "RTX 3060 12GB"; `all` for every known GPU.', show_default="this machine's"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Estimate the memory, hours and disk space of a run, without loading weights.

    Exits with code 1 when the run does not fit, and lists what to change, the cheapest change first.
    """

    from tuna_peft.cli import plan_output
    from tuna_peft.models.base.hub_files import files_here
    from tuna_peft.models.base.load import load_config
    from tuna_peft.planning.from_recipe import plan_recipe, this_device
    from tuna_peft.planning.gpus import GPUS, find_gpu
    from tuna_peft.planning.spec import Device
    from tuna_peft.recipe.load import load_recipe
    from tuna_peft.recipe.resolved import resolve_stages
    from tuna_peft.run.checks import check_adapters

    gpus = GPUS if gpu == "all" else [find_gpu(gpu)] if gpu else []
    loaded = load_recipe(recipe, overrides or [], missing=True)
    devices = [Device.of(one) for one in gpus] or [this_device(loaded.base.device, timed=True)]
    base = loaded.base
    if files_here(base.model, base.revision, "config.json") and not base.trust_remote_code:  # it runs nobody's code
        config = load_config(base.model, revision=base.revision)
        check_adapters(loaded, resolve_stages(loaded), config)
    plans, source = plan_recipe(loaded, devices)
    if as_json:
        import json

        dicts = [plan_output.as_dict(made, source) for made in plans]
        echo(json.dumps(dicts[0] if len(dicts) == 1 else dicts, indent=2))
    else:
        shown = plan_output.describe(plans[0], source) if len(plans) == 1 else plan_output.over_gpus(plans)
        console(soft_wrap=not sys.stdout.isatty()).print(shown)  # a file keeps each sentence in one line
    if not any(made.fits for made in plans):
        raise typer.Exit(1)
