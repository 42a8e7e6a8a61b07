"""What several commands make of their options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from tuna_peft.errors import UserError
from tuna_peft.recipe.messages import expected

if TYPE_CHECKING:
    from tuna_peft.data.config import DataSource, PromptConfig

Model = TypeVar("Model", bound=BaseModel)

# Where data is and how to read it.
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto, ranked, teacher, judge, formatted, alpaca, preference, columns.",
        rich_help_panel="Data",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="part=path, again for each part: --column completions=responses[].text; completions=a,b: two columns",
        show_default=False,
        rich_help_panel="Data",
    ),
]
Split = Annotated[str, typer.Option("--split", help="Split, with slices: train[:500].", rich_help_panel="Data")]
Template = Annotated[
    str,
    typer.Option(
        "--template", help="alpaca, chat, none, or a text with {instruction} and {input}.", rich_help_panel="Data"
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Skip and count records that cannot be used.", rich_help_panel="Data")
]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending money.")]

# A model to answer, and how it is loaded.
AnyModel = Annotated[
    str, typer.Argument(metavar="MODEL|RUN|STACK", help="A run's folder, a stack, a merged model, a Hub id, builtin:.")
]
Upto = Annotated[
    str | None, typer.Option("--upto", help="Of a stack: with the stages up to this one.", show_default="all")
]
StackBase = Annotated[
    str | None, typer.Option("--base-model", help="Of a stack: where its base is now.", show_default="as recorded")
]
Quantization = Annotated[
    str, typer.Option("--quantization", help="Of a single model: nf4, fp4, int8 or none; a stack keeps its own.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
OtherTemplate = Annotated[
    str | None, typer.Option("--template", help="alpaca, chat, none, or a text.", show_default="that of training")
]

# A stack, and what its exports are measured on.
Stack = Annotated[
    str, typer.Argument(metavar="STACK|RUN", help="A folder with stack.json, a run's folder, or a Hub id.")
]
BasePath = Annotated[
    str | None, typer.Option("--base-model", help="Where the base is now.", show_default="as recorded")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="Data: measure on 16 of its prompts how far the export is from the stack.",
        show_default="of a run: the run's own",
    ),
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Where there are prompts: load stack and export and measure.")
]


def from_options(model: type[Model], values: dict[str, Any]) -> Model:
    """A section of a recipe, made of command-line options.

    Raises:
        UserError: The first value that is wrong, and what was expected.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"]) or None
        raise UserError(expected([first], first["input"]), where=where) from error


def data_source(
    path: str, format: str, columns: list[str] | None, split: str, template: str, skip_bad_rows: bool
) -> tuple[DataSource, PromptConfig]:
    """The data and the prompt template that the options above describe; UserError for what does not fit."""
    from tuna_peft.data.config import DataSource, PromptConfig

    source: dict[str, Any] = {
        "path": path,
        "format": "columns" if columns and format == "auto" else format,
        "split": split,
        "on_bad_row": "skip" if skip_bad_rows else "error",
    }
    if columns:
        source["columns"] = _pairs(columns)
    return from_options(DataSource, source), from_options(PromptConfig, {"template": template})


def _pairs(columns: list[str]) -> dict[str, str | list[str]]:
    pairs: dict[str, str | list[str]] = {}
    for text in columns:
        part, equals, path = text.partition("=")
        if not equals:
            raise UserError(
                "expected part=path", where=f"--column {text}", fix="For example: completions=responses[].text"
            )
        several = part in ("completions", "scores", "ranks") and "," in path  # a column for each
        pairs[part] = path.split(",") if several else path
    return pairs


def require_jsonl(out: Path) -> None:
    """UserError for an output file of another kind."""
    if out.suffix != ".jsonl":
        raise UserError(
            f"cannot write {out.suffix or 'a file without ending'}", where=str(out), fix="End it in .jsonl."
        )
