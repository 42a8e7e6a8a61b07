"""`tuna-peft evaluate`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.consent import Yes, require_consent
from tuna_peft.cli.data_options import DataOptions, reads_data
from tuna_peft.cli.options import AnyModel, Device, OtherTemplate, Quantization, StackBase, from_options
from tuna_peft.terminal import console, echo, log_handler

if TYPE_CHECKING:
    from tuna_peft.recipe.schema import Recipe


@reads_data("template")
def evaluate(
    model: AnyModel,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value of the recipe's `evaluation`, for example tasks.superni.shots=[0].", show_default=False
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="NAME[=PATH]",
            show_default="those of the run's recipe",
            help="ranking, graded, superni, lmentry, vicuna or lm-eval, with the path of its data (for ranking and "
            "graded it may be a recipe). Repeatable.",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            help="For a stack: evaluate only this stage, or base. Repeatable.",
            show_default="base and every stage",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the results.", show_default="the run, or runs/evaluation-MODEL"
        ),
    ] = None,
    template: OtherTemplate = None,
    base_model: StackBase = None,
    quantization: Quantization = "none",
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    yes: Yes = False,
    *,
    reading: DataOptions,
) -> None:
    """Evaluate a model, or every stage of a run, on benchmarks. Existing results are kept."""
    import logging

    from transformers.utils import logging as transformers_logging

    from tuna_peft.cli.results import results_tables
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.errors import UserError
    from tuna_peft.evaluation.report.write import write_report
    from tuna_peft.recipe.evaluation_schema import EvaluationSettings
    from tuna_peft.run.evaluate import Loading, default_output, evaluate_target, holds_prompts_back, settings_of_run
    from tuna_peft.run.folder import read_run_recipe

    transformers_logging.disable_progress_bar()
    logging.getLogger("tuna_peft").setLevel(logging.INFO)
    logging.getLogger("tuna_peft").addHandler(log_handler())
    recipe = read_run_recipe(Path(model))
    values = _settings(settings_of_run(model), task or [], overrides or [], reading, recipe)
    settings = from_options(EvaluationSettings, values)
    if not settings.tasks.given() and not holds_prompts_back(model):
        raise UserError("there is nothing to evaluate", fix="Name a task: --task ranking=held-out.jsonl.")
    folder = output or default_output(model)
    require_consent(settings, yes=yes)  # a run's folder names them, and may come from a stranger, too
    results = evaluate_target(
        model,
        settings,
        folder,
        stages=stage,
        prompt=None if template is None else from_options(PromptConfig, {"template": template}),
        loading=Loading(base_model, quantization, device, trust_remote_code),
    )
    screen = console()
    screen.print(results_tables(results, screen.width), crop=False)
    echo(f"Every prompt's score: {folder}/evaluation/")
    write_report(folder)
    echo(f"Report: {folder}/report.html")


def _settings(
    recorded: dict[str, Any], tasks: list[str], overrides: list[str], reading: DataOptions, recipe: Recipe | None
) -> dict[str, Any]:
    """A run's settings, restricted to the tasks that were named, with the overrides applied."""
    from tuna_peft.errors import UserError, did_you_mean
    from tuna_peft.recipe.document import Document
    from tuna_peft.recipe.evaluation_schema import TaskSettings
    from tuna_peft.recipe.layers import apply_overrides

    values, unused = copy.deepcopy(recorded), reading != DataOptions()
    before = values.setdefault("tasks", {})
    if tasks:
        values["tasks"] = {}
    for text in tasks:
        name, equals, path = text.partition("=")
        key = name.replace("-", "_")
        if key not in TaskSettings.model_fields:
            raise UserError(f"there is no task {name!r}", fix=did_you_mean(key, TaskSettings.model_fields))
        values["tasks"][key] = {"path": path} if equals else before.get(key, {})
        if equals and key in ("ranking", "graded"):  # the others have formats of their own
            source, _ = reading.source(path, default=recipe)
            values["tasks"][key] = source.model_dump(exclude_defaults=True)
            unused = False
    if unused:
        raise UserError("options of data have no effect without data", fix="Name it: --task ranking=held-out.csv.")
    document = Document(values)
    apply_overrides(document, overrides)
    return document.data
