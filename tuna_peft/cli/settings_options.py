"""Command-line options made from the settings of recipes: one name, default and description for one thing.

`tuna-peft sample`, `score`, `judge`, `generate` and `chat` use this. A new field in `tuna_peft.feedback.settings` is
an option at once.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

# Options that had another name in `score` and `judge`.
_RENAMED = {
    "--base-url": "--server",
    "--server-model": "--model",
    "--retries": "--max-retries",
    "--skip-unanswered": "--on-no-answer skip",
}


class SettingsCommand(TyperCommand):
    """A command with an option for every field of some settings.

    `max_tokens` becomes `--max-tokens`. A section inside the settings becomes options of its own: `server` becomes
    `--server URL --model NAME` and one option for each of its other fields, `generate` the flag `--generate` and one
    option for each of its fields.

    The command's function finds what was given in `context.obj`: the values that differ from their defaults, nested as
    in a recipe and not validated yet (see `tuna_peft.cli.options.from_options`).

    Attributes:
        settings: Name of a class in `tuna_peft.feedback.settings`. It is imported when the options are first needed:
            `tuna-peft --help` shows no options, and pydantic's classes would cost it a tenth of a second.
        panel: Heading of these options in `--help`.
    """

    settings: ClassVar[str]
    panel: ClassVar[str]

    @functools.cached_property
    def _options(self) -> dict[str, _Option]:
        from tuna_peft.feedback import settings

        return _options_of(getattr(settings, self.settings), self.panel)

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments first, then the settings, then the command's own options."""
        own = super().get_params(ctx)
        arguments = [one for one in own if one.param_type_name == "argument"]
        return arguments + [option.param for option in self._options.values()] + own[len(arguments) :]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """UserError for an old name."""
        for name in (arg.partition("=")[0] for arg in args):
            if name in _RENAMED:
                raise UserError(f"{name} is now called {_RENAMED[name]}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command with what was given in `ctx.obj`."""
        found = {name: ctx.params.pop(name) for name in self._options}
        ctx.obj = _nested(found, self._options)
        return super().invoke(ctx)


@dataclass(frozen=True)
class _Option:
    """Where the value of an option belongs in the settings, and how it is asked for.

    Attributes:
        path: Keys from the outside in, `("server", "in_flight")`.
        default: The value of an option that was not given.
        values: What some texts stand for: `true` and `false` where other texts are possible, too.
        param: What parses the option and describes it in `--help`.
    """

    path: tuple[str, ...]
    default: Any
    values: dict[str, bool]
    param: Any


def _options_of(settings: type[BaseModel], panel: str) -> dict[str, _Option]:
    """The options by the name of their parameter."""
    from pydantic.fields import FieldInfo

    from tuna_peft.feedback.settings import ServerSettings

    fields: dict[str, tuple[tuple[str, ...], FieldInfo, str]] = {}

    def add(name: str, path: tuple[str, ...], field: FieldInfo, heading: str) -> None:
        assert name not in fields, f"two options --{name}"
        fields[name] = path, field, heading

    for name, field in settings.model_fields.items():
        section, heading = _section(field), f"With --{name}"
        if section is None:
            add(name, (name,), field, panel)
            continue
        inner = dict(section.model_fields)
        if issubclass(section, ServerSettings):
            address = inner.pop("base_url")
            if "model" in settings.model_fields:
                del inner["model"]  # `--model` serves for both, see `_nested`
            help = f"{address.description} `model` is then the model's name there."
            add(name, (name, "base_url"), FieldInfo(annotation=str, default=None, description=help), heading)
        else:
            add(name, (name,), FieldInfo(annotation=bool, default=False, description=field.description), heading)
        for key, inner_field in inner.items():
            add(key, (name, key), inner_field, heading)
    return {name: _option(name, path, field, heading, fields) for name, (path, field, heading) in fields.items()}


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that has fields itself."""
    return next((kind for kind in get_args(field.annotation) if hasattr(kind, "model_fields")), None)


def _option(name: str, path: tuple[str, ...], field: FieldInfo, panel: str, known: Mapping[str, Any]) -> _Option:
    kind, choices = _kind(field.annotation)
    default = None if field.is_required() else field.default
    flag = f"--{name.replace('_', '-')}"
    if kind is bool and default:
        flag += f"/--no-{flag[2:]}"
    values = {}
    if kind is str and isinstance(default, bool):
        default, values = str(default).lower(), {"true": True, "false": False}

    def as_option(match: re.Match[str]) -> str:
        return f"--{match[1].replace('_', '-')}" if match[1] in known else match[0]

    info = typer.Option(
        default,
        flag,
        help=re.sub(r"`(\w+)`", as_option, field.description or ""),
        metavar=f"[{'|'.join(choices)}]" if choices else None,
        rich_help_panel=panel,
        show_default=default is not None,
        **_range(kind, field),
    )
    return _Option(path, default, values, _parameter(name, kind, info))


def _parameter(name: str, kind: type, info: Any) -> Any:
    """The parameter that typer makes from a function's argument; it has no public way to make a single one."""

    def command(**values: Any) -> None: ...

    argument = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)
    command.__signature__ = inspect.Signature([argument])  # type: ignore[attr-defined]
    command.__annotations__ = {name: kind}
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return typer.main.get_command(app).params[0]


def _kind(annotation: Any) -> tuple[type, list[str]]:
    """The type of an option, and its choices where there are some (true and false written as in YAML)."""
    if get_origin(annotation) is Literal:
        return str, [str(choice).lower() if isinstance(choice, bool) else choice for choice in get_args(annotation)]
    kinds = [one for one in get_args(annotation) or (annotation,) if one is not NoneType]
    if any(get_origin(one) is Literal for one in kinds):  # a number, or a word in its place
        words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one)]
        return str, ["number", *words]
    [kind] = kinds
    return kind, []


def _range(kind: type, field: FieldInfo) -> dict[str, Any]:
    """Bounds for `--help`. Typer has none that exclude the bound itself: those of floats are left to pydantic."""
    bounds = {
        name: value
        for part in field.metadata
        for name in ("ge", "gt", "le")
        if (value := getattr(part, name, None)) is not None
    }
    if kind is int and "gt" in bounds:
        bounds["ge"] = bounds["gt"] + 1
    elif "gt" in bounds:
        return {}
    return {"min": bounds.get("ge"), "max": bounds.get("le")}


def _nested(values: Mapping[str, Any], options: Mapping[str, _Option]) -> dict[str, Any]:
    """What was given, as in a recipe.

    Raises:
        UserError: An option of a section without the option that asks for the section, or a server without a model.
    """
    sections = {option.path[0] for option in options.values() if len(option.path) == 2}
    changed = {name: value for name, value in values.items() if value != options[name].default}
    given: dict[str, Any] = {name: {} for name in changed if name in sections}
    for name, value in changed.items():
        section, *key = options[name].path
        if key and section not in given:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --{section}")
        if key:
            given[section][key[0]] = value
        elif name not in sections:
            given[name] = options[name].values.get(value, value)
    if "server" in given and "model" not in given["server"]:
        if "model" not in given:
            raise UserError("a server needs the name of its model", where="--server", fix="Give it with --model.")
        given["server"]["model"] = given.pop("model")
    return given
