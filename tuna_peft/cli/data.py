"""`tuna-peft data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuna_peft.cli.consent import require_consent
from tuna_peft.cli.data_options import DataOptions, reads_data
from tuna_peft.errors import UserError
from tuna_peft.terminal import console, echo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuna_peft.recipe.schema import BaseSettings

app = typer.Typer(help="Show data as training uses it, and convert it.", no_args_is_help=True)


@app.command("inspect")
@reads_data()
def inspect(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE|RUN|FILE", help="A recipe (file or shipped name), a run's folder, or data."),
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of prompts to show.")] = 3,
    stage: Annotated[
        str | None, typer.Option("--stage", help="For a recipe: show only this stage.", show_default="all")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Hub id or path.", show_default="for a recipe: that of its base model"),
    ] = None,
    *,
    reading: DataOptions,
) -> None:
    """Show prompts with their responses in rank order: score, length, and which tokens have a loss."""

    from tuna_peft.data.inspect import inspect_file, inspect_prompts
    from tuna_peft.recipe.resolved import resolve_stages
    from tuna_peft.run.recipe_data import find_recipe_of_data

    screen = console()
    found = find_recipe_of_data(target)
    if found is None:
        if stage is not None:
            raise UserError("--stage needs a recipe; this is data", where=target)
        source, prompt = reading.source(target)
        screen.print(inspect_file(source, prompt, load_tokenizer(tokenizer), n))
        return
    if reading != DataOptions():
        raise UserError("options of data have no effect on a recipe, which says how its data is read", where=target)
    recipe, named = found
    stage = stage or named
    require_consent(recipe.base, yes=True)  # it may say that code of the tokenizer is to be run
    names = [entry.name for entry in recipe.stages]
    if stage is not None and stage not in names:
        raise UserError(f"the recipe has no stage `{stage}`", where=target, fix=f"It has: {', '.join(names)}.")
    loaded = load_tokenizer(tokenizer or recipe.base.model, None if tokenizer else recipe.base)
    for entry in {one.section: one for one in resolve_stages(recipe)}.values():  # rounds share their data
        if stage in (None, entry.section):
            screen.rule(f"stage {entry.section} ({entry.type})")
            if entry.feedback:
                screen.print(inspect_prompts(entry.source, recipe.prompt, n))
                continue
            screen.print(
                inspect_file(
                    entry.source,
                    recipe.prompt,
                    loaded,
                    n,
                    supervised=entry.type == "sft",
                    max_length=entry.max_length,
                    overflow=entry.overflow,
                )
            )


@app.command("convert")
@reads_data()
def convert_file(
    file: Annotated[
        str, typer.Argument(help="Data in any format that can be read; or a recipe or run, or RECIPE@STAGE.")
    ],
    out: Annotated[Path, typer.Argument(help="The .jsonl or .parquet file to write.")],
    *,
    reading: DataOptions,
) -> None:
    """Write data in the ranked format: prompt, completions, scores, ranks, reference."""
    from tuna_peft.data.convert import convert
    from tuna_peft.data.losses import describe_losses

    source, prompt = reading.source(file)
    report = convert(source, prompt, out)
    echo(f"wrote {out}: {report.kept} of {report.read} records")
    for line in describe_losses(report.as_dict()):
        echo(f"  {line}")


def load_tokenizer(name: str | None, base: BaseSettings | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer with this name, or None without a name; UserError if it cannot be loaded."""
    if name is None:
        return None
    from transformers import AutoTokenizer

    from tuna_peft.models.base.load import resolve_model_path

    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code} if base else {}
    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(name), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a tokenizer: {reason}", where=name, fix="Check the path or Hub id.") from error
