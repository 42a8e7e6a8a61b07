"""The options that say how data is read: the same ones, for every command that reads data."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tuna_peft.cli.options import from_options
from tuna_peft.errors import UserError
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.recipe.schema import Recipe


def _option(flag: str, help: str, shown: str | bool = False) -> Any:
    return typer.Option(flag, help=help, show_default=shown, rich_help_panel="Data")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What was given on the command line; `reads_data` adds these options to a command."""

    recipe: Annotated[
        str | None,
        _option("--recipe", "Recipe or run (or RECIPE@STAGE) whose data settings and template are the defaults here."),
    ] = None
    format: Annotated[
        str | None,
        _option(
            "--format",
            "auto, ranked, teacher, judge, formatted, alpaca, preference, columns, or that of a public data set, "
            "such as ultrafeedback.",
            "auto",
        ),
    ] = None
    column: Annotated[
        list[str] | None,
        _option(
            "--column",
            "part=path, once for each part: --column completions=responses[].text. Two columns: completions=a,b. "
            "A weight or a label: scores.helpfulness=0.7, winner_labels.1=0.",
        ),
    ] = None
    group_by: Annotated[
        list[str] | None, _option("--group-by", "Column that rows about the same prompt share. Repeatable.")
    ] = None
    header: Annotated[
        bool | None,
        _option("--header/--no-header", "Whether the first line of a CSV file names the columns.", "header"),
    ] = None
    split: Annotated[
        str | None, _option("--split", "Name of the split, with an optional slice: train[:500].", "train")
    ] = None
    skip_bad_rows: Annotated[bool, _option("--skip-bad-rows", "Skip and count records that cannot be used.")] = False
    template: Annotated[
        str | None,
        _option("--template", "alpaca, chat, none, or a text with {instruction} and {input}.", "alpaca"),
    ] = None

    def given(self) -> dict[str, Any]:
        """What the options say, as keys of `DataSource`.

        Raises:
            UserError: An entry of --column has no path.
        """
        keys: dict[str, Any] = {"format": self.format, "group_by": self.group_by or None, "header": self.header,
                                "split": self.split, "on_bad_row": "skip" if self.skip_bad_rows else None}  # fmt: skip
        if self.column:
            keys["columns"] = _pairs(self.column)
        return {key: value for key, value in keys.items() if value is not None}

    def source(self, path: str, default: Recipe | None = None) -> tuple[DataSource, PromptConfig]:
        """The data and the prompt template that the options describe.

        Args:
            path: The data; or a recipe or run, whose data is then meant.
            default: Without --recipe: its settings are used where they suit the first record.

        Raises:
            UserError: A wrong value, an unreadable recipe or file, or a recipe whose stages have different data.
        """
        from tuna_peft.data.config import DataSource, PromptConfig
        from tuna_peft.run.recipe_data import find_recipe_of_data, only_source, reading_settings

        like = None if self.recipe is None else find_recipe_of_data(self.recipe)
        if self.recipe is not None and like is None:
            raise UserError("this is neither a recipe nor the folder of a run", where=f"--recipe {self.recipe}")
        prompt = None if like is None else like[0].prompt
        values = {"path": path, **self.given()}
        explicit = {"columns", "format"} & values.keys()
        if (itself := find_recipe_of_data(path)) is not None:
            source = only_source(*itself, path)
            echo(f"data of {path}: {source.title}", err=True)
            prompt = prompt or itself[0].prompt
            kept = source.model_dump(exclude_defaults=True, exclude={"columns", "format"} if explicit else None)
            values = {**kept, **self.given()}
        elif like is not None and not explicit:
            values = {**reading_settings(values, *like, required=True), **values}
        elif default is not None and not explicit and (way := reading_settings(values, default, required=False)):
            echo(f"{path} is read like the data of the run", err=True)
            values = {**way, **values}
        if self.template is not None or prompt is None:
            prompt = from_options(PromptConfig, {} if self.template is None else {"template": self.template})
        return from_options(DataSource, values), prompt


def reads_data(*own: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `DataOptions`, at its end; its parameter `reading` receives them.

    Args:
        own: Options that the command has itself, with another meaning.
    """
    hints = get_type_hints(DataOptions, include_extras=True)
    fields = [field for field in dataclasses.fields(DataOptions) if field.name not in own]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            reading = DataOptions(**{field.name: values.pop(field.name) for field in fields})
            command(**values, reading=reading)

        parameters = dict(inspect.signature(command, eval_str=True).parameters)
        del parameters["reading"]
        options = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields
        ]
        wrapped.__signature__ = inspect.Signature([*parameters.values(), *options])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {}
        return wrapped

    return decorate


def _pairs(columns: list[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in columns:
        part, equals, path = text.partition("=")
        if not equals:
            raise UserError(
                "expected part=path", where=f"--column {text}", fix="For example: completions=responses[].text"
            )
        part, dot, key = part.partition(".")
        if dot:  # an entry of `scores` or `winner_labels`
            pairs.setdefault(part, {})[key] = path
            continue
        several = part in ("completions", "scores", "ranks", "winner") and "," in path  # one column for each response
        pairs[part] = path.split(",") if several else path
    return pairs
