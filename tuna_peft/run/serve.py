"""What `tuna-peft serve` does: starts an existing engine on an export, checks its answers, waits until it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.export.gguf.modelfile import MODELFILE
from tuna_peft.feedback.server import Server, choice_text, choices
from tuna_peft.feedback.settings import ServerSettings
from tuna_peft.models.base.memory import free_memory
from tuna_peft.models.generation.generate import generate_responses
from tuna_peft.models.stack.any_model import load_any_model, local_stack, usual_prompt
from tuna_peft.run.serving import CHECKED_TOKENS, INSTALL, Engine, Served, equal_answers, find_program, wait_for_server

_QUESTIONS = ("Name a color.", "What is the capital of France?", "Sort: pear, apple, fig.", "Write a short poem.")
_STARTING = 30.0
"""Minutes that an engine may take to start: vLLM compiles, and reads large models from disk."""


class _Ended(Exception):
    """The engine ended by itself."""


def find_exports(folder: Path, name: str | None, host: str, port: int) -> dict[Engine, Served]:
    """What each engine can serve of a run's folder, a merged model's, or a GGUF file.

    Raises:
        UserError: Nothing was exported.
    """
    where: dict[str, Any] = {"name": name or folder.absolute().name.removesuffix(".gguf"), "host": host, "port": port}
    merged = next((str(one) for one in (folder / "merged", folder) if (one / "config.json").is_file()), None)
    files = [folder] if folder.suffix == ".gguf" and folder.is_file() else sorted(
        file for one in (folder, folder / "gguf") for file in one.glob("*.gguf") if "-LORA-" not in file.name
    )  # fmt: skip
    found: dict[Engine, Served] = {}
    if merged is not None:
        found["vllm"] = Served(merged, **where)
        found["transformers"] = Served(merged, **where)
    if files:
        # The largest file is the least rounded one.
        found["llama.cpp"] = Served(str(max(files, key=lambda file: file.stat().st_size)), **where)
    if files and (files[0].parent / MODELFILE).is_file():
        found["ollama"] = Served(str(files[0].parent), **where)
    if not found:
        raise UserError(
            "there is no merged model and no GGUF file to serve",
            where=str(folder),
            fix=f"Write one: tuna-peft merge {folder} {folder / 'merged'}",
        )
    return found


def choose_engine(exports: dict[Engine, Served], wanted: str | None, *, installed: bool = True) -> Engine:
    """The engine that is wanted, or else the first one that is installed and can serve an export.

    Args:
        installed: Accept only an engine that is installed; otherwise prefer one.

    Raises:
        UserError: There is no such engine; it needs another export; or it, or every one, is not installed.
    """
    if wanted is not None:
        if wanted not in INSTALL:
            raise UserError(f"there is no engine {wanted!r}", where="--engine", fix=did_you_mean(wanted, INSTALL))
        if (engine := next((one for one in exports if one == wanted), None)) is None:
            way = "`tuna-peft export gguf`" if wanted in ("llama.cpp", "ollama") else "`tuna-peft merge`"
            raise UserError(f"{wanted} has nothing to serve here", where="--engine", fix=f"Export it first: {way}.")
        if installed and find_program(engine) is None:
            raise UserError(f"{wanted} is not installed", where="--engine", fix=f"Install it: {INSTALL[engine]}.")
        return engine
    possible = [engine for engine in INSTALL if engine in exports]
    found = [engine for engine in possible if find_program(engine)]
    if not found and installed:
        ways = "; or ".join(f"{engine} ({INSTALL[engine]})" for engine in possible)
        raise UserError("no engine is installed that can serve this", fix=f"Install {ways}.")
    return (found or possible)[0]


def expected_answers(folder: Path, device: str) -> tuple[PromptConfig, list[str]] | None:
    """The prompt template of a run's stack, and its greedy answers to some questions; None without a stack."""
    if not folder.is_dir() or local_stack(str(folder)) is None:
        return None
    loaded = load_any_model(str(folder), device=device)
    prompt = PromptConfig.model_validate(loaded.prompt or usual_prompt(loaded.tokenizer))
    ids = [prompt_ids(PromptTemplate(prompt).render(one), loaded.tokenizer) for one in _QUESTIONS]
    answers = generate_responses(loaded.model, loaded.tokenizer, ids, max_new_tokens=CHECKED_TOKENS)
    del loaded
    free_memory()  # the engine needs it
    return prompt, answers


def run_server(
    served: Served, engine: Engine, expected: tuple[PromptConfig, list[str]] | None, say: Callable[[str], None]
) -> None:
    """Runs the engine until it ends or Ctrl-C, and says whether it answers as expected.

    Raises:
        UserError: It ended with an error.
    """
    command = served.command(engine)
    environment = {**os.environ, "OLLAMA_HOST": f"{served.host}:{served.port}"} if engine == "ollama" else None
    process = subprocess.Popen([find_program(engine) or command[0], *command[1:]], env=environment)

    def alive() -> None:
        if process.poll() is not None:
            raise _Ended

    try:
        with contextlib.suppress(_Ended):
            if engine == "ollama":
                create = ["ollama", "create", served.name, "-f", str(Path(served.model) / MODELFILE)]
                while subprocess.run(create, env=environment, check=False).returncode:
                    alive()
            if expected is not None:
                _check(served, engine, *expected, alive, say)
        if process.wait():
            raise UserError(
                f"{engine} ended with exit code {process.returncode}", fix="Its own messages above say why."
            )
    except KeyboardInterrupt:
        say(f"\nstopping {engine}")
    finally:
        process.terminate()
        process.wait()


def _check(
    served: Served, engine: Engine, prompt: PromptConfig, expected: list[str], alive: Callable[[], None],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Says how many answers of the server are the expected ones, once it answers."""
    host = "127.0.0.1" if served.host in ("0.0.0.0", "::") else served.host
    server = Server(
        ServerSettings(
            base_url=f"http://{host}:{served.port}/v1",
            model=served.model if engine == "transformers" else served.name,
            api_key_env="TUNA_PEFT_SERVE_API_KEY",  # not the key of another server
            max_retries=0,
        )
    )

    def answer(question: str) -> str:
        text, options = PromptTemplate(prompt).render(question), {"max_tokens": CHECKED_TOKENS, "temperature": 0.0}
        # Ollama puts its template around completions, too.
        if isinstance(text, str) and engine != "ollama":
            reply = server.complete(text, **options)
        else:
            reply = server.chat([{"role": "user", "content": question}], **options)
        return choice_text(choices(reply)[0]).strip()

    answers = wait_for_server(
        lambda: [answer(question) for question in _QUESTIONS], None, _STARTING, engine, alive, say
    )
    equal = equal_answers(answers, expected)
    say(f"ready: http://{host}:{served.port}/v1, model {server.settings.model}")
    say(f"{equal} of {len(expected)} greedy answers are those of the unmerged adapters")
    if 2 * equal < len(expected):
        say("this is rounding (small GGUF types), or another model: `tuna-peft divergence` measures it")
