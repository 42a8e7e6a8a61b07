"""Options that several commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import BaseModel, ValidationError

from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.recipe.messages import expected

Model = TypeVar("Model", bound=BaseModel)

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending money.")]

# Which model, and how to load it.
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN|STACK", help="A run's folder, a stack, a merged model, a Hub id, or builtin:pico-llama."
    ),
]
Upto = Annotated[
    str | None, typer.Option("--upto", help="For a stack: use the stages up to this one.", show_default="all")
]
StackBase = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        help="For a stack: path or Hub id of its base model, if it has moved.",
        show_default="as recorded",
    ),
]
Quantization = Annotated[
    str, typer.Option("--quantization", help="For a single model: nf4, fp4, int8 or none; a stack keeps its own.")
]
Device = Annotated[
    str, typer.Option("--device", help="Where a model on this machine runs: auto, cpu, cuda, cuda:1 ...")
]
OtherTemplate = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="alpaca, chat, none, or a text with {instruction} and {input}.",
        show_default="as in training",
    ),
]

# A stack, and how to measure its exports.
Stack = Annotated[
    str, typer.Argument(metavar="STACK|RUN", help="A folder with stack.json, a run's folder, or a Hub id.")
]
BasePath = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="Path or Hub id of the base model, if it has moved.", show_default="as recorded"
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="Dataset to measure on (16 prompts): how far is the export from the stack?",
        show_default="for a run: prompts of the run",
    ),
]
AllowLostUpdate = Annotated[
    bool,
    typer.Option(
        "--allow-lost-update", help="Write it even if rounding undoes more than half of what the adapters changed."
    ),
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Measure the export on the prompts, if there are any.")
]


def from_options(model: type[Model], values: dict[str, Any]) -> Model:
    """Validates the values of options as a section of a recipe.

    Raises:
        UserError: A value is wrong; names the first one and what is expected.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        where, value = _keys(errors[0]), errors[0]["input"]
        if errors[0]["type"] == "extra_forbidden":
            *sections, key = errors[0]["loc"]
            fix = did_you_mean(str(key), _fields_in(model, sections))
            raise UserError("there is no such key", where=where, fix=fix) from error
        raise UserError(expected([one for one in errors if _keys(one) == where], value), where=where) from error


def _fields_in(model: type[BaseModel], sections: list[int | str]) -> list[str]:
    """The keys of a section inside a model; without them if it is none that the model has."""
    for name in sections:
        field = model.model_fields.get(str(name))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _keys(error: Any) -> str | None:
    """Where an error is, without the alternatives of a union, which pydantic adds: `batch_size.constrained-int`."""
    return ".".join(str(key) for key in error["loc"] if isinstance(key, int) or key.isidentifier()) or None


def require_jsonl(out: Path) -> None:
    """UserError for an output file that does not end in .jsonl."""
    if out.suffix != ".jsonl":
        raise UserError(
            f"cannot write {out.suffix or 'a file without ending'}", where=str(out), fix="Let its name end in .jsonl."
        )
