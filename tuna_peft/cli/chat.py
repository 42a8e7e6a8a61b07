"""`tuna-peft chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.options import AnyModel, Device, OtherTemplate, StackBase, from_options, require_jsonl
from tuna_peft.cli.settings_options import SettingsCommand
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.terminal import clean, console, echo

if TYPE_CHECKING:
    from tuna_peft.models.generation.conversation import Conversation, Reply

_HELP = """\
/stage NAME         let another stage answer: {stages}
/compare [QUESTION] answers of all stages, to the last question by default
/temperature NUMBER 0 takes the most likely token
/save FILE          write the conversation to a .jsonl file
/reset              forget the conversation
/help               this list
Ctrl-C stops an answer; Ctrl-D or /quit ends the chat."""

_NARROWEST = 16
"""Characters. Answers stand below each other where columns would be narrower."""


class ChatCommand(SettingsCommand):
    """Options of `ChatSettings`."""

    settings, panel = "ChatSettings", "Generation"


def chat(
    context: typer.Context,
    model: AnyModel,
    stage: Annotated[
        str | None, typer.Option("--stage", help="The stage that answers first, or base.", show_default="the last")
    ] = None,
    template: OtherTemplate = None,
    base_model: StackBase = None,
    device: Device = "auto",
) -> None:
    """Talk to a model; switch between the stages of a run, or compare them. Lines may also come from a pipe."""
    from transformers.utils import logging

    from tuna_peft.data.config import PromptConfig
    from tuna_peft.feedback.settings import ChatSettings
    from tuna_peft.models.generation.conversation import Conversation
    from tuna_peft.models.stack.any_model import load_any_model, usual_prompt

    logging.disable_progress_bar()
    settings = from_options(ChatSettings, context.obj)
    wanted = None if template is None else from_options(PromptConfig, {"template": template})
    loaded = load_any_model(model, base_model=base_model, device=device)
    prompt = wanted or PromptConfig.model_validate(loaded.prompt or usual_prompt(loaded.tokenizer))
    screen = Chat(Conversation(loaded, prompt), settings.model_dump())
    if stage is not None:
        screen.stage(stage)
    echo(f"Stages: {', '.join(screen.conversation.stages)}\n/help lists the commands, Ctrl-D ends the chat.")
    if not screen.conversation.remembers:
        echo("Without a chat template: each question is answered by itself.")
    with _ended_by_sigterm(), contextlib.closing(screen.conversation):
        for line in screen.lines():
            screen.take(line)


class Chat:
    """What is typed and shown.

    Args:
        conversation: With the model.
        options: The values of `ChatSettings`.
    """

    def __init__(self, conversation: Conversation, options: dict[str, Any]):
        self.conversation, self.options = conversation, options
        self._commands: dict[str, Callable[[str], None]] = {
            "stage": self.stage, "compare": self.compare, "temperature": self.temperature, "save": self.save,
            "reset": self.reset, "help": self.help,
        }  # fmt: skip
        self._forgotten = 0

    def lines(self) -> Iterator[str]:
        """Lines that are typed or piped, without empty ones."""
        typed = sys.stdin.isatty()
        if typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` arrow keys and a history
        while True:
            prompt = f"\n{clean(self.conversation.stage)}> "
            try:
                line = input(prompt) if typed else sys.stdin.readline()
            except KeyboardInterrupt:
                echo("\nCtrl-D ends the chat.")
                continue
            except EOFError:
                line = ""
                echo("")
            else:
                line += "\n" if typed else ""
            if not line or line.strip() in ("/quit", "/exit"):
                return
            if line.strip():
                if not typed:
                    echo(f"{prompt}{line.strip()}")
                yield line.strip()

    def take(self, line: str) -> None:
        """Answers a question or obeys a command; a mistake is explained, and the chat continues."""
        try:
            if not line.startswith("/"):
                self.ask(line)
                return
            name, _, argument = line[1:].partition(" ")
            if name not in self._commands:
                raise UserError(f"there is no command /{name}", fix=did_you_mean(name, self._commands))
            self._commands[name](argument.strip())
        except UserError as error:
            echo(f"error: {error}", err=True)

    def ask(self, question: str) -> None:
        """Shows the answer while it is generated."""
        reply = self.conversation.ask(question, lambda piece: echo(piece, nl=False), **self.options)
        echo(" [stopped]" if reply.stopped else "" if reply.text else "[an empty answer]")
        self._say_what_is_forgotten()

    def compare(self, question: str) -> None:
        """Shows the answers of all stages side by side."""
        replies = self.conversation.compare(question or None, **self.options)
        console().print(side_by_side(replies, console().width), crop=False)
        self._say_what_is_forgotten()

    def stage(self, name: str) -> None:
        """Lets another stage answer."""
        self.conversation.switch(name)

    def temperature(self, value: str) -> None:
        """Another temperature."""
        from tuna_peft.feedback.settings import ChatSettings

        self.options = from_options(ChatSettings, {**self.options, "temperature": value}).model_dump()

    def save(self, name: str) -> None:
        """Writes the conversation, as a record of messages; never over a file."""
        from tuna_peft.files import write_jsonl

        file = Path(name).expanduser()
        require_jsonl(file)
        if file.exists():
            raise UserError("there is such a file already", where=str(file), fix="Choose another name.")
        write_jsonl(file, [{"messages": self.conversation.messages}])
        echo(f"wrote {file}: {len(self.conversation.messages)} messages")

    def reset(self, _: str) -> None:
        """Forgets the conversation."""
        self.conversation.reset()
        self._forgotten = 0

    def help(self, _: str) -> None:
        """Lists the commands."""
        echo(_HELP.format(stages=", ".join(self.conversation.stages)))

    def _say_what_is_forgotten(self) -> None:
        if self.conversation.forgotten > self._forgotten:
            self._forgotten = self.conversation.forgotten
            echo(f"(the model's context is full: it no longer sees the first {self._forgotten} messages)")


def side_by_side(replies: dict[str, Reply], width: int) -> Any:
    """A table of answers: a column for each stage if `width` is enough, else a row."""
    from rich.table import Table

    texts = [reply.text + " [stopped]" * reply.stopped for reply in replies.values()]
    if len(replies) * (_NARROWEST + 3) <= width:
        table = Table(*replies, expand=True)
        for column in table.columns:
            column.ratio, column.overflow = 1, "fold"
        table.add_row(*texts)
        return table
    table = Table("stage", "answer", show_lines=True)
    for stage, text in zip(replies, texts, strict=True):
        table.add_row(stage, text)
    return table


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM counts as Ctrl-C elsewhere, and Ctrl-C only stops an answer here: it ends the process instead."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
