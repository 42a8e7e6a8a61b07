"""`tuna-peft generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.options import AnyModel, Device, OtherTemplate, StackBase, Upto, from_options
from tuna_peft.cli.settings_options import SettingsCommand
from tuna_peft.errors import UserError
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.ranked import Prompt


class GenerateCommand(SettingsCommand):
    """Options of `ResponseSettings`."""

    settings, panel = "ResponseSettings", "Generation"


def generate(
    context: typer.Context,
    model: AnyModel,
    prompt: Annotated[
        str | None, typer.Argument(help="The instruction.", show_default="each line of standard input")
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="The input of the instruction.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A .txt file with an instruction per line, or prompts in any format that can be read. Prints JSON "
            "lines of prompt and responses.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print a response while it is generated.")] = False,
    upto: Upto = None,
    template: OtherTemplate = None,
    base_model: StackBase = None,
    device: Device = "auto",
) -> None:
    """Answer instructions with a stack of adapters, a merged model, or any causal LM."""
    from transformers.utils import logging

    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.templates import PromptTemplate
    from tuna_peft.data.texts import prompt_ids
    from tuna_peft.feedback.settings import ResponseSettings
    from tuna_peft.models.generation.conversation import Pieces
    from tuna_peft.models.generation.generate import stream_responses
    from tuna_peft.models.stack.any_model import load_any_model, usual_prompt

    logging.disable_progress_bar()
    settings = from_options(ResponseSettings, context.obj)
    _require_fitting(settings.n, settings.temperature, prompt, input, prompts, stream)
    wanted = None if template is None else from_options(PromptConfig, {"template": template})
    if prompts is not None and not prompts.is_file():
        raise UserError("there is no such file", where=str(prompts))
    loaded = load_any_model(model, upto=upto, base_model=base_model, device=device)
    config = wanted or PromptConfig.model_validate(loaded.prompt or usual_prompt(loaded.tokenizer))

    def responses(asked: list[Prompt], **more: Any) -> list[list[str]]:
        texts: list[list[str]] = [[] for _ in asked]
        ids = [prompt_ids(one, loaded.tokenizer) for one in asked]
        for generated in stream_responses(loaded.model, loaded.tokenizer, ids, **settings.model_dump(), **more):
            texts[generated.index] = generated.texts
        return texts

    if prompts is not None:
        asked = _read(prompts, config)
        for one, texts in zip(asked, responses(asked), strict=True):
            echo(json.dumps({"prompt": one, "responses": texts}, ensure_ascii=False))
        return
    for instruction in _instructions(prompt):
        rendered = PromptTemplate(config).render(instruction, input)
        if stream:
            pieces = Pieces(loaded.tokenizer, lambda piece: echo(piece, nl=False))
            pieces.end(responses([rendered], watch=pieces.add)[0][0])
            echo("")
        else:
            for text in responses([rendered])[0]:
                echo(text)


def _require_fitting(
    n: int, temperature: float, prompt: str | None, input: str | None, prompts: Path | None, stream: bool
) -> None:
    """UserError for options that exclude each other."""
    if n > 1 and temperature == 0:
        raise UserError(f"{n} greedy responses would be equal", where="--n", fix="Give --temperature as well.")
    if stream and (n > 1 or prompts is not None):
        raise UserError("one response at a time can be streamed", where="--stream", fix="Leave out --n and --prompts.")
    if prompts is not None and (prompt is not None or input is not None):
        raise UserError("give an instruction or a file of them, not both", where="--prompts")


def _read(file: Path, config: PromptConfig) -> list[Prompt]:
    """The prompts in a file; `.txt` has an instruction per line."""
    from tuna_peft.data.config import DataSource
    from tuna_peft.data.json_files import read_text
    from tuna_peft.data.load import load_prompts
    from tuna_peft.data.templates import PromptTemplate

    if file.suffix == ".txt":
        lines = read_text(file).splitlines()
        return [PromptTemplate(config).render(line.strip()) for line in lines if line.strip()]
    source = from_options(DataSource, {"path": str(file)})
    return [record["prompt"] for record in load_prompts(source, config)[0]]


def _instructions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    if sys.stdin.isatty():
        echo("One instruction per line; Ctrl-D ends.", err=True)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
