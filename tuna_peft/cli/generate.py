"""`tuna-peft generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuna_peft.models.adapter_stack import AdapterStack


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN|STACK", help="A run's folder, a stack, a merged model, a Hub id or builtin:."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="The instruction.", show_default="each line of standard input")
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="The input that goes with it.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest response.")] = 128,
    upto: Annotated[
        str | None, typer.Option("--upto", help="Of a stack: with the stages up to this one.", show_default="all")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="alpaca, chat, none, or a text.", show_default="that of training")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Of a stack: where its base is now.", show_default="as recorded")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Answer an instruction with a stack of adapters, a merged model, or any causal LM."""
    from transformers.utils import logging

    from tuna_peft.cli.options import from_options
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.templates import PromptTemplate
    from tuna_peft.data.texts import prompt_ids
    from tuna_peft.models.generation import generate_responses

    logging.disable_progress_bar()
    wanted = None if template is None else from_options(PromptConfig, {"template": template})
    loaded = _load(model, upto, base_model, device)
    recorded = loaded.prompt or _usual_prompt(loaded.tokenizer)
    prompts = PromptTemplate(wanted or PromptConfig.model_validate(recorded))
    for instruction in _instructions(prompt):
        ids = prompt_ids(prompts.render(instruction, input), loaded.tokenizer)
        [response] = generate_responses(loaded.model, loaded.tokenizer, [ids], max_new_tokens=max_new_tokens)
        typer.echo(response)


def _load(model: str, upto: str | None, base_model: str | None, device: str) -> AdapterStack:
    """A stack, or any other model as a stack of no adapters."""
    from tuna_peft.errors import UserError
    from tuna_peft.models.adapter_stack import AdapterStack
    from tuna_peft.models.base import load_base

    folder = Path(model)
    for candidate in (folder / "stack", folder):
        # A lone adapter goes the same way: it is refused with the reason.
        if (candidate / "stack.json").is_file() or (candidate / "adapter_config.json").is_file():
            return AdapterStack.from_pretrained(candidate, upto=upto, base_model=base_model, device=device)
    if upto is not None:
        raise UserError("--upto goes with a stack; this is a single model", where=model)
    base = load_base(model, device=device)
    record = folder / "tuna_export.json"
    prompt = json.loads(record.read_text(encoding="utf-8"))["stack"]["prompt"] if record.is_file() else {}
    return AdapterStack(base.model, base.tokenizer, prompt)


def _usual_prompt(tokenizer: Any) -> dict[str, str]:
    """For a model of which nothing is recorded."""
    return {"template": "chat" if tokenizer.chat_template else "alpaca"}


def _instructions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
