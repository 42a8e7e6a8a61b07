"""Sampling by a server in a run: exports the model, prints the command that serves it, waits, and checks its answers.

The user starts the server: in another environment, beside training, or on another machine that sees the folder.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuna_peft.data.ranked import Record
from tuna_peft.data.texts import prompt_ids
from tuna_peft.export.base_files import model_folder, read_config
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.output import RECORD
from tuna_peft.feedback.server_sampler import ServerSampler
from tuna_peft.feedback.vllm_sampler import lora_rank
from tuna_peft.files import write_json
from tuna_peft.limits import within_context
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.models.generation.generate import context_of, generate_responses
from tuna_peft.models.stack.any_model import model_digest
from tuna_peft.recipe.feedback_schema import StageSample, StageServer
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.recipe.schema import BaseSettings
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.serving import CHECKED_TOKENS, Served, equal_answers, wait_for_server

logger = logging.getLogger("tuna_peft")

_CHECKED_PROMPTS = 4


def exported_sampler(
    run: RunDirectory, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, stage: ResolvedStage,
    sample: StageSample, settings: StageServer, prompts: list[Record],
) -> ServerSampler:  # fmt: skip
    """A sampler whose first request waits until the server serves the run's model.

    Args:
        model: With the adapters active that `stage` samples from.
        prompts: The prompts of the stage, for the length of the context and for the check.

    Raises:
        UserError: The model cannot be exported; while sampling, no server answers as the model does.
    """
    names = list(stage.samples_from)
    folder = run.stage_folder(stage.name) / "served"
    if settings.engine == "transformers":  # it knows the model by its folder
        named = str(folder.absolute()) if names else _base(run.recipe.base, settings)
        settings = settings.model_copy(update={"model": named})
    context = context_of(model)

    def ready() -> None:
        longest = max(len(prompt_ids(one["prompt"], tokenizer, one.get("tools"))) for one in prompts)
        served = _export(run, names, settings, folder, within_context(longest + sample.max_new_tokens, context))
        command = shlex.join(served.command(settings.engine))
        logger.info("start a server on this model, for example with:\n  %s", command)
        asked = [one["prompt"] for one in prompts[:_CHECKED_PROMPTS]]
        expected = generate_responses(
            model, tokenizer, [prompt_ids(one, tokenizer) for one in asked], max_new_tokens=CHECKED_TOKENS
        )
        once = settings.model_copy(update={"max_retries": 0})
        probe = ServerSampler(once, tokenizer, {})
        answers = wait_for_server(
            lambda: [probe.greedy(one, CHECKED_TOKENS) for one in asked], expected, settings.wait_minutes, command
        )
        equal = equal_answers(answers, expected)
        logger.info("%d of %d greedy answers of the server are those of the adapters", equal, len(expected))

    return ServerSampler(settings, tokenizer, model_digest(model, names), context=context, ready=ready)


def _export(run: RunDirectory, names: list[str], settings: StageServer, folder: Path, context: int | None) -> Served:
    """Writes what the settings say, unless an interrupted run did, and how to serve it."""
    recipe, stack = run.recipe, run.path / "stack"
    address = urlsplit(settings.base_url)
    where: dict[str, Any] = {"name": settings.model, "port": address.port or 8000, "context": context}
    if address.hostname not in ("localhost", "127.0.0.1"):
        where["host"] = "0.0.0.0"  # another machine: its own name need not be known there
    device = "cpu" if run.processes.sharding else recipe.base.device
    served_base = not names or settings.export == "combined"
    path = _base(recipe.base, settings) if served_base else str(folder.absolute())
    if names and not (folder / RECORD).is_file():
        if settings.export == "combined":
            combine_stack(stack, folder, upto=names[-1])
        else:
            merge = recipe.export.merge
            merge_stack(
                stack, folder, upto=names[-1], dtype="bfloat16" if merge.dtype in ("nf4", "int8") else merge.dtype,
                base=merge.base, load_dtype=recipe.base.dtype, device=device, allow_lost_update=True,
                trust_remote_code=recipe.base.trust_remote_code,
            )  # fmt: skip
            _sample_plainly(folder)
    if names and settings.export == "combined":
        return Served(path, adapter=str(folder.absolute()), rank=lora_rank(folder), **where)
    if settings.engine == "llama.cpp":
        path = _as_gguf(Path(path), folder.with_name("served-gguf"))
    return Served(path, **where)


def _sample_plainly(folder: Path) -> None:
    """Lets servers sample as the settings say: `transformers serve` takes `do_sample` and `top_k` from this file."""
    file = folder / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tokens = {key: value for key, value in config.items() if key.endswith("token_id")}
    write_json(file, {**tokens, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0})


def _base(base: BaseSettings, settings: StageServer) -> str:
    """What every engine takes in whatever folder it is started: a folder's absolute path, or a Hub id.

    Of a Hub model the folder in the cache, where an engine would take another revision or does not read Hub models.
    """
    path = Path(resolve_model_path(base.model))
    if path.exists() or base.revision or settings.engine == "llama.cpp":
        return str(model_folder(base.model, base.revision, "base").absolute())
    return base.model


def _as_gguf(model: Path, folder: Path) -> str:
    """A 16- or 32-bit GGUF file of the model, in the dtype of its weights."""
    from tuna_peft.export.gguf.model import export_gguf  # imports the optional package `gguf`

    if not (folder / RECORD).is_file():
        config = read_config(model)
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        export_gguf(model, folder, types=[{"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")], name="model")
    return str(next(folder.glob("*.gguf")).absolute())
