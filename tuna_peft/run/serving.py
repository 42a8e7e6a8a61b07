"""Commands that start existing servers on an export, and waiting for such a server.

A stage that samples by a server (`tuna_peft.run.sample_server`) prints the command; `tuna-peft serve` runs it.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuna_peft.errors import UserError
from tuna_peft.feedback.spending import CostLimitReached

logger = logging.getLogger("tuna_peft")

Engine = Literal["vllm", "sglang", "llama.cpp", "transformers", "ollama"]

INSTALL: dict[Engine, str] = {
    "vllm": "pip install vllm, in an environment of its own",
    "llama.cpp": "llama-server from https://github.com/ggml-org/llama.cpp/releases, or brew install llama.cpp",
    "transformers": "pip install 'transformers[serving]'",
    "ollama": "https://ollama.com/download",
}
"""The engines that `tuna-peft serve` starts, in the order in which they are preferred, and how to get them."""

CHECKED_TOKENS = 16
"""Tokens of each greedy answer that is compared."""
_SLOTS = 8
"""Responses that llama.cpp's server generates at once."""
_EVERY = 30.0
"""Seconds between two messages while waiting."""
_PAUSE = 2.0
"""Seconds between two attempts."""


@dataclass(frozen=True)
class Served:
    """What a server is started on.

    Args:
        model: Folder of a merged model, a GGUF file, the folder of an Ollama Modelfile, or with `adapter` the base.
        name: The model's name in requests; `transformers serve` takes the folder instead.
        host: Address to listen on.
        port: Port to listen on.
        context: Maximum tokens of a prompt with its response; None for the model's own limit.
        adapter: Folder of the combined adapter.
        rank: The largest rank that the engine must accept, with `adapter`.
    """

    model: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    context: int | None = None
    adapter: str | None = None
    rank: int | None = None

    def command(self, engine: Engine) -> list[str]:
        """The command that starts `engine` on it, in the foreground."""
        where = ["--host", self.host, "--port", str(self.port)]
        if engine == "vllm":
            # Without `--generation-config` vLLM samples with the temperature, top_k ... that the base came with.
            return [
                "vllm", "serve", self.model, "--served-model-name", *([] if self.adapter else [self.name]),
                *([f"{self.name}-base", "--enable-lora", "--lora-modules", f"{self.name}={self.adapter}",
                   "--max-lora-rank", str(self.rank)] if self.adapter else []),
                "--generation-config", "vllm", *self._context("--max-model-len"), *where,
            ]  # fmt: skip
        if engine == "sglang":
            return [
                "python", "-m", "sglang.launch_server", "--model-path", self.model,
                *(["--lora-paths", f"{self.name}={self.adapter}"] if self.adapter
                  else ["--served-model-name", self.name]),
                *self._context("--context-length"), *where,
            ]  # fmt: skip
        if engine == "llama.cpp":
            # Its slots, each of which answers one response, divide `-c` among them.
            slots = [] if self.context is None else ["-c", str(self.context * _SLOTS), "-np", str(_SLOTS)]
            return ["llama-server", "-m", self.model, "--alias", self.name, *slots, *where]
        if engine == "transformers":
            return ["transformers", "serve", *where, self.model]
        return ["ollama", "serve"]

    def _context(self, option: str) -> list[str]:
        return [] if self.context is None else [option, str(self.context)]


def find_program(engine: Engine) -> str | None:
    """Path of the program that starts `engine`; None if it is not installed."""
    if engine == "transformers":
        program = shutil.which("transformers", path=str(Path(sys.executable).parent))
        return program if importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn") else None
    return shutil.which({"llama.cpp": "llama-server"}.get(engine, engine))


def equal_answers(answers: Sequence[str], expected: Sequence[str]) -> int:
    """How many of the answers are the expected ones."""
    return sum(one == other for one, other in zip(answers, expected, strict=True))


def wait_for_server(
    ask: Callable[[], list[str]], expected: Sequence[str] | None, minutes: float, command: str,
    alive: Callable[[], None] = lambda: None, say: Callable[[str], None] = logger.info,
) -> list[str]:  # fmt: skip
    """Waits until a server answers as the unmerged adapters do; says every 30 seconds what it waits for.

    An export is rounded to other numbers than the stack, after which a greedy answer can continue with another word.
    So at least half of the answers must be equal; those of another model hardly are.

    Args:
        ask: Asks the server for the greedy answers; UserError as long as it does not answer.
        expected: The greedy answers of the unmerged adapters; None accepts any.
        minutes: How long to wait.
        command: The command that starts the server, for messages.
        alive: Raises an error if it is of no use to wait longer.
        say: Prints a line.

    Returns:
        The answers.

    Raises:
        UserError: The time is over; the message names the command and what the server answered last.
    """
    began, said = time.monotonic(), None
    while True:
        alive()
        try:
            answers = ask()
        except CostLimitReached:
            raise
        except UserError as error:
            state = error.what
        else:
            if expected is None or 2 * equal_answers(answers, expected) >= len(expected):
                return answers
            mine, other = next((a, b) for a, b in zip(expected, answers, strict=True) if a != b)
            state = f"it serves another model: it answers {other!r:.60}, the unmerged adapters {mine!r:.60}"
        waited = time.monotonic() - began
        if waited >= 60 * minutes:
            raise UserError(
                f"no server answers as this model does after {minutes:g} minutes: {state}",
                fix=f"Start one, then run the same command again: {command}",
            )
        if said is None or waited - said >= _EVERY:
            say(f"waiting for the server: {state}")
            said = waited
        time.sleep(_PAUSE)
