"""`tuna-peft init`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.data import load_tokenizer
from tuna_peft.cli.data_options import DataOptions, reads_data
from tuna_peft.cli.options import from_options
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.data.config import DataSource
    from tuna_peft.recipe.draft import Goal
    from tuna_peft.recipe.schema import Recipe

_ON_CPU, _ON_GPU = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-1.7B"


@reads_data("template")
def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None, typer.Option("--data", help="File, folder or Hub id of the data.", show_default="asked for")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id or folder of the base model.", show_default="asked for")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help='For example T4 or "RTX 3060 12GB".', show_default="this machine's")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="chat, alpaca, none, or a text with {instruction}.", show_default="asked for"),
    ] = None,
    goal: Annotated[
        str | None, typer.Option("--goal", help="rank, sft-rank, sft or sample.", show_default="asked for")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    *,
    reading: DataOptions,
) -> None:
    """Write a first recipe: asks for data, model, GPU, template and goal, and reads the data.

    Without a terminal, options that are not given have the default that a question would show.
    """
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.files import write_text
    from tuna_peft.planning.gpus import find_gpu
    from tuna_peft.recipe.draft import GOALS, draft_recipe
    from tuna_peft.recipe.load import load_recipe

    if file.suffix not in (".yaml", ".yml"):
        as_data = f" --data {file}" if data is None and file.exists() else ""
        fix = f"For example `tuna-peft init {file.with_suffix('.yaml')}{as_data}`."
        raise UserError("a recipe is a .yaml file", where=str(file), fix=fix)
    if file.exists() and not force:
        raise UserError(
            "the file exists already", where=str(file), fix="Give another name, or --force to overwrite it."
        )
    if data is None and not _asks():
        raise UserError("init needs to know the data", fix="Give it with --data FILE.")
    data = data or typer.prompt("Data: a file, a folder or a Hub id")
    source, _ = reading.source(data)
    source, prompts, messages, goals = _read(source)
    model = model or _ask("Base model: a Hub id or a folder", _ON_GPU if gpu or _has_gpu() else _ON_CPU)
    gpu = gpu if gpu is not None else _ask("GPU, such as T4 (empty: this machine)", "")
    if gpu:
        find_gpu(gpu)
    template = template or _ask(
        "Prompt template: chat, alpaca, none or your own text", "chat" if messages else _template_of(model)
    )
    from_options(PromptConfig, {"template": template})
    if _asks() and goal is None:
        for name in goals:
            echo(f"  {name:8}  {GOALS[name]}")
    goal = goal or _ask("Goal", goals[0])
    if goal not in GOALS:
        raise UserError(f"there is no goal {goal!r}", where="--goal", fix=did_you_mean(goal, GOALS))
    if goal not in goals:
        raise UserError(
            f"the data has nothing for the goal {goal!r} ({GOALS[goal]})",
            where=source.title,
            fix=f"It has what is needed for: {', '.join(goals)}.",
        )

    folder = file.absolute().parent  # a recipe's paths are relative to it
    paths = [os.path.relpath(path, folder) if Path(path).exists() else path for path in source.paths]
    source = source.model_copy(update={"path": paths[0] if isinstance(source.path, str) else paths})
    write_text(file, draft_recipe(file.stem, source, prompts, model, template, goal))
    recipe = load_recipe(str(file))
    echo(f"wrote {file}")
    echo(_fits(recipe, gpu))
    echo(f"Next: tuna-peft data inspect {file}, then tuna-peft run {file} --dry-run")


def _asks() -> bool:
    return sys.stdin.isatty()


def _ask(question: str, default: str) -> str:
    return str(typer.prompt(question, default=default)) if _asks() else default


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read(source: DataSource) -> tuple[DataSource, int, bool, list[Goal]]:
    """Reads the data.

    Returns:
        The source with the settings that read it, the number of prompts, whether these are messages, and the goals
        that the data allows.

    Raises:
        UserError: The data cannot be read; says which decision is missing.
    """
    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.data.load import load_prompts, load_ranked, load_sft, source_format
    from tuna_peft.data.losses import describe_losses
    from tuna_peft.data.sources import read_records
    from tuna_peft.data.suggest import suggest, unused

    # The default template, alpaca, suits every record; which one the recipe gets is decided later.
    prompt = PromptConfig()
    failure: UserError | None = None
    try:
        source = source_format(source)[1]
    except UserError as unknown:
        failure = unknown
        _, first = next(read_records(source.model_copy(update={"limit": 1})))
        settings, missing = suggest(first)
        if missing and _asks():
            settings, missing = _ask_columns(first, settings["columns"]), []
        if not missing or _is_enough(first, settings["columns"]):
            given = source.model_dump(exclude_defaults=True)
            source = from_options(DataSource, given | {"format": "columns"} | settings)
            failure = None
            echo(f"columns: {', '.join(f'{part} = {_shown(path)}' for part, path in settings['columns'].items())}")
        if rest := unused(first, settings["columns"]):
            echo(f"not used: {', '.join(rest)} (--column PART=COLUMN for each part says otherwise)")
    tolerant = source.model_copy(update={"on_bad_row": "skip"})
    readers: list[tuple[Callable[..., Any], list[Goal]]] = [
        (load_ranked, ["rank", "sft-rank", "sft", "sample"]),
        (load_sft, ["sft", "sample"]),
        (load_prompts, ["sample"]),
    ]
    for read, goals in readers[2:] if failure else readers:
        try:
            rows, report = read(tolerant, prompt)
        except UserError as error:
            failure = failure or error
            continue
        echo(f"{source.title}: {report.read} records read, {report.kept} kept")
        for line in describe_losses(report.as_dict()):
            echo(f"  {line}")
        return tolerant if report.skipped else source, report.kept, isinstance(rows[0]["prompt"], list), goals
    assert failure is not None
    raise failure


def _ask_columns(record: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Settings of `DataSource` from what the user says about the columns; what was guessed is the default."""
    echo(f"The columns are {', '.join(record)}.")
    several = "several with commas, empty: none"
    questions = {"instruction": "Column of the prompt", "input": "Column of an input for the prompt (empty: none)",
                 "completions": f"Column of the responses ({several})"}  # fmt: skip
    if not columns.keys() & {"ranks", "winner", "strength"}:
        questions["scores"] = f"Column of their scores, higher is better ({several})"
    for part, question in questions.items():
        answer = typer.prompt(question, default=_shown(columns.pop(part, "")))
        if answer.strip():
            paths = [path.strip() for path in answer.split(",")]
            columns[part] = paths if len(paths) > 1 else paths[0]
    one_a_row = isinstance(columns.get("completions"), str) and isinstance(record.get(columns["completions"]), str)
    grouped = one_a_row and "scores" in columns
    return {"columns": columns, **({"group_by": columns["instruction"]} if grouped else {})}


def _is_enough(record: dict[str, Any], columns: dict[str, Any]) -> bool:
    """Whether the columns that were found allow a goal, and nothing is left that may be responses."""
    from tuna_peft.data.suggest import unused

    if "instruction" not in columns:
        return False
    if "completions" in columns:
        return isinstance(columns["completions"], str) and isinstance(record.get(columns["completions"]), str)
    return not any(isinstance(record[key], str | list | dict) for key in unused(record, columns) if key != "id")


def _shown(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _fits(recipe: Recipe, gpu: str) -> str:
    """One sentence: whether the run fits, as `tuna-peft plan` says it."""
    from tuna_peft.cli.plan_output import gib, hours_text
    from tuna_peft.planning.from_recipe import plan_recipe, this_device
    from tuna_peft.planning.gpus import find_gpu
    from tuna_peft.planning.spec import Device

    try:
        device = Device.of(find_gpu(gpu)) if gpu else this_device(recipe.base.device)
        [plan], _ = plan_recipe(recipe, [device])
    except UserError as error:
        return f"Not planned: {str(error).splitlines()[0]}"
    if not plan.fits:
        return f"It does not fit on {device.name}: {gib(plan.needed)} needed. `tuna-peft plan` says what saves memory."
    hours = "" if plan.hours is None else f", {hours_text(plan.hours)} hours"
    return f"Planned for {device.name}: {gib(plan.needed)} needed{hours}."


def _template_of(model: str) -> str:
    """`chat` where the model's tokenizer has a chat template, or its name says so and it is not on this machine."""
    try:
        tokenizer = load_tokenizer(model)
    except UserError:
        return "chat" if any(word in model.lower() for word in ("instruct", "chat", "-it", "qwen3")) else "alpaca"
    return "chat" if tokenizer is not None and tokenizer.chat_template else "alpaca"
