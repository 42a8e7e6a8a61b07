"""`tuna-peft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.terminal import console, echo

if TYPE_CHECKING:
    from tuna_peft.evaluation.compare_results import Pairing, ResultComparison


def compare(
    first: Annotated[
        str, typer.Argument(metavar="RUN[@STAGE]", help="A run or an evaluation; its last stage, or STAGE.")
    ],
    second: Annotated[
        str, typer.Argument(metavar="RUN[@STAGE]", help="The run or evaluation to compare with the first.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Compare only this task. Repeatable.", show_default="all"),
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Number of wins and of losses to print.")] = 3,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write all results to this JSON file, with all wins and losses.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare two evaluations prompt by prompt: paired difference, wins and losses with both responses."""
    import dataclasses

    from rich.table import Table

    from tuna_peft.errors import UserError
    from tuna_peft.evaluation.compare_results import compare_results
    from tuna_peft.evaluation.results import TITLES, Metric, in_percent, number
    from tuna_peft.files import write_json

    left, right = _results(first), _results(second)
    wanted = [name for name in left if not task or name in task or name.partition("-")[0] in task]
    common = [name for name in wanted if name in right and name != "answers"]  # nothing grades those
    if not common:
        raise UserError(
            f"no task in common: {first} has {', '.join(left) or 'none'}, {second} has {', '.join(right) or 'none'}",
            fix="Run `tuna-peft evaluate` on both with the same --task.",
        )
    comparisons = [compare_results(left[name], right[name]) for name in common]
    table = Table("paired by prompt", "first", "second", "difference", "won/lost/tied")
    for column in table.columns[1:]:
        column.no_wrap = True
    for one in comparisons:
        values = one.values or (None, None)
        cells = [number(value, among=values, percent=in_percent(one.task)) for value in values]
        counts = f"{len(one.wins)}/{len(one.losses)}/{one.ties}"
        name = TITLES.get(one.task, f"{one.task} {one.metric}")
        table.add_row(name, *cells, str(one.difference or Metric(None)), counts)
    echo(f"first   {first}\nsecond  {second}")
    console().print(table, crop=False)
    for one in comparisons:
        _print_unpaired(one, first, second)
        for title, pairings in (("win", one.wins), ("loss", one.losses)):
            for pairing in pairings[:show]:
                _print_pairing(one.task, title, pairing)
    if json is not None:
        write_json(json, {"first": first, "second": second, "tasks": [dataclasses.asdict(one) for one in comparisons]})


def _results(target: str) -> dict[str, Any]:
    """The results of one stage, by task."""
    from tuna_peft.errors import UserError, did_you_mean
    from tuna_peft.evaluation.results import load_results
    from tuna_peft.recipe.resolved import stage_names
    from tuna_peft.run.folder import read_run_recipe

    path, at, stage = target, "", ""
    if not Path(target).is_dir():
        path, at, stage = target.rpartition("@")
        if not at:
            path = target
    recipe = read_run_recipe(Path(path))
    order = None if recipe is None else stage_names(recipe)
    results = load_results(Path(path), order)
    if not results:
        raise UserError("there are no results", where=path, fix="Run `tuna-peft evaluate` on it first.")
    if stage and stage not in results:
        raise UserError(f"there are no results of a stage {stage!r}", where=path, fix=did_you_mean(stage, results))
    return results[stage or list(results)[-1]]


def _print_unpaired(one: ResultComparison, first: str, second: str) -> None:
    for count, what in (
        (one.only_first, f"only in {first}"),
        (one.only_second, f"only in {second}"),
        (one.unscored, "without a score in one of them"),
    ):
        if count:
            echo(f"{one.task}: {count} prompts {what}, not compared", fg="yellow")


def _print_pairing(task: str, title: str, pairing: Pairing) -> None:
    def shortened(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= 300 else line[:297] + "..."

    scores = f"{pairing.scores[0]:.3f} -> {pairing.scores[1]:.3f}"
    echo(f"\n{task}, {title}, {pairing.id}: {scores}", bold=True)
    echo(f"  prompt  {shortened(pairing.prompt)}")
    echo(f"  first   {shortened(pairing.responses[0])}")
    echo(f"  second  {shortened(pairing.responses[1])}")
    if pairing.references:
        echo(f"  right   {shortened(pairing.references[0])}")
