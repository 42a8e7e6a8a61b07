"""Options that are made from settings: all of them, under the names of recipes, nested as a recipe is."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import typer
from pydantic import BaseModel, Field, PositiveInt
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.cli.settings_options import SettingsCommand, _options_of
from tuna_peft.feedback import settings as module
from tuna_peft.feedback.settings import (
    GenerateSettings,
    JudgeSettings,
    SampleSettings,
    ScoreSettings,
    ServerSettings,
)

COMMANDS = {"sample": SampleSettings, "score": ScoreSettings, "judge": JudgeSettings}


def options_of_command(name):
    command = typer.main.get_command(app).commands[name]
    return {option for one in command.get_params(typer.Context(command)) for option in one.opts}


def as_options(settings, but=()):
    return {"--" + name.replace("_", "-") for name in settings.model_fields.keys() - {*but}}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_an_option(name):
    assert as_options(COMMANDS[name]) <= options_of_command(name)


def test_fields_of_sections_are_options_of_one_name():
    of_server = as_options(ServerSettings, but=["base_url"])
    assert of_server <= options_of_command("judge") and of_server <= options_of_command("score")
    assert as_options(GenerateSettings) <= options_of_command("score")
    assert {"--device", "--yes"} <= options_of_command("judge") & options_of_command("score")


def parsed(monkeypatch, settings, *arguments):
    """What a command with options of `settings` is given; its exit code and output where it fails."""

    class Command(SettingsCommand):
        settings, panel = "ExampleSettings", "A panel"

    monkeypatch.setattr(module, "ExampleSettings", settings, raising=False)
    seen = []
    small = typer.Typer()

    @small.command(cls=Command)
    def run(context: typer.Context, file: str, own: int = 1) -> None:
        seen.append((file, own, context.obj))

    result = CliRunner().invoke(small, list(arguments))
    return seen[0] if seen else result


class Example(BaseModel):
    count: int = Field(4, gt=1, description="How many, see `kind`.")
    share: float = Field(0.5, gt=0, description="How much.")
    kind: Literal["a", "b"] = Field("a", description="Which.")
    answer: Literal[False, True, "other"] = Field(False, description="Whether.")
    text: str | None = Field(None, description="Words.")
    on: bool = Field(True, description="On.")
    off: bool = Field(False, description="Off.")
    size: PositiveInt | Literal["auto"] = Field("auto", description="Large.")


def test_values_are_those_that_were_given(monkeypatch):
    assert parsed(monkeypatch, Example, "f") == ("f", 1, {})
    given = ["--count", "5", "--share", "1.5", "--kind", "c", "--answer", "true", "--text", "true", "--no-on", "--off"]
    given += ["--size", "7"]
    assert parsed(monkeypatch, Example, "f", "--own", "2", *given) == (
        "f", 2,
        {"count": 5, "share": 1.5, "kind": "c", "answer": True, "text": "true", "on": False, "off": True,
         "size": "7"},
    )  # fmt: skip
    assert parsed(monkeypatch, Example, "f", "--answer", "other")[2] == {"answer": "other"}
    assert Example.model_validate({"size": "7"}).size == 7
    assert parsed(monkeypatch, Example, "f", "--count", "1").exit_code == 2


def test_help_shows_defaults_ranges_and_choices(monkeypatch):
    text = re.sub(r"[\s│]+", " ", parsed(monkeypatch, Example, "--help").output)
    for part in (
        "How many, see --kind. [default: 4]",
        "x>=2",
        "[a|b]",
        "[false|true|other]",
        "--on --no-on",
        "A panel",
    ):
        assert part in text, part


def test_a_section_is_nested(monkeypatch):
    server = ["--server", "http://h/v1", "--model", "m", "--in-flight", "3"]
    assert parsed(monkeypatch, JudgeSettings, "f", *server)[2] == {
        "server": {"base_url": "http://h/v1", "model": "m", "in_flight": 3}
    }
    generate = [*server[:4], "--generate", "--n", "2"]
    assert parsed(monkeypatch, ScoreSettings, "f", *generate)[2] == {
        "server": {"base_url": "http://h/v1", "model": "m"}, "generate": {"n": 2},
    }  # fmt: skip
    assert parsed(monkeypatch, ScoreSettings, "f", "--model", "m")[2] == {"model": "m"}


def test_two_options_of_one_name_are_found_out():
    class Clash(BaseModel):
        timeout: int = 1
        server: ServerSettings | None = None

    with pytest.raises(AssertionError, match="two options --timeout"):
        _options_of(Clash, "Clash")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge", "d", "o.jsonl", "--model", "m", "--in-flight", "2"], "--in-flight has no effect without --server"),
        (["score", "d", "o.jsonl", "--model", "m", "--n", "2"], "--n has no effect without --generate"),
        (["score", "d", "o.jsonl", "--server", "http://h/v1"], "a server needs the name of its model"),
        (["score", "d", "o.jsonl", "--base-url=http://h/v1"], "--base-url is now called --server"),
        (["score", "d", "o.jsonl", "--server-model", "m"], "--server-model is now called --model"),
        (["judge", "d", "o.jsonl", "--retries", "2"], "--retries is now called --max-retries"),
        (["judge", "d", "o.jsonl", "--skip-unanswered"], "--skip-unanswered is now called --on-no-answer skip"),
        (
            ["score", "d", "o.jsonl", "--logprobs", "x", "--on-no-answer", "skip"],
            "without effect with --logprobs",
        ),
    ],
)
def test_mistakes(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
