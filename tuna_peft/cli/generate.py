"""`tuna-peft generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from tuna_peft.cli.options import AnyModel, Device, OtherTemplate, StackBase, Upto, from_options
from tuna_peft.terminal import echo


def generate(
    model: AnyModel,
    prompt: Annotated[
        str | None, typer.Argument(help="The instruction.", show_default="each line of standard input")
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="The input of the instruction.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum length of a response, in tokens.")
    ] = 128,
    upto: Upto = None,
    template: OtherTemplate = None,
    base_model: StackBase = None,
    device: Device = "auto",
) -> None:
    """Answer an instruction with a stack of adapters, a merged model, or any causal LM."""
    from transformers.utils import logging

    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.templates import PromptTemplate
    from tuna_peft.data.texts import prompt_ids
    from tuna_peft.models.generation.generate import generate_responses
    from tuna_peft.models.stack.any_model import load_any_model, usual_prompt

    logging.disable_progress_bar()
    wanted = None if template is None else from_options(PromptConfig, {"template": template})
    loaded = load_any_model(model, upto=upto, base_model=base_model, device=device)
    prompts = PromptTemplate(wanted or PromptConfig.model_validate(loaded.prompt or usual_prompt(loaded.tokenizer)))
    for instruction in _instructions(prompt):
        ids = prompt_ids(prompts.render(instruction, input), loaded.tokenizer)
        [response] = generate_responses(loaded.model, loaded.tokenizer, [ids], max_new_tokens=max_new_tokens)
        echo(response)


def _instructions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    if sys.stdin.isatty():
        echo("One instruction per line; Ctrl-D ends.", err=True)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
