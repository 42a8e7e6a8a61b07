"""Opens a sampler for a model: the model itself in transformers, a server of it, or a vLLM engine.

`tuna-peft sample` and the stages of a run that sample (`tuna_peft.run.rank_samples`) call this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.texts import set_template_date
from tuna_peft.errors import UserError
from tuna_peft.export.combine import combine_stack
from tuna_peft.feedback.sampling import ModelSampler, Sampler
from tuna_peft.feedback.server_sampler import ServerSampler
from tuna_peft.feedback.settings import SampleServer
from tuna_peft.feedback.spending import Estimate
from tuna_peft.feedback.vllm_sampler import VllmSampler
from tuna_peft.limits import context_length
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.models.stack.any_model import load_any_model, local_stack, usual_prompt
from tuna_peft.models.stack.files import quantization_method
from tuna_peft.models.stack.manifest import read_manifest


@contextmanager
def open_sampler(
    model: str,
    backend: str = "transformers",
    *,
    upto: str | None = None,
    base_model: str | None = None,
    quantization: str = "none",
    device: str = "auto",
) -> Iterator[tuple[Sampler, PromptConfig]]:
    """A sampler for any kind of model, and the prompt template that the model was trained with.

    Args:
        model: A run's folder, a stack, a Hub id ..., see `load_any_model`; so are the arguments after `backend`.
        backend: `transformers` or `vllm`.

    Raises:
        UserError: The model cannot be loaded.
    """
    if backend == "vllm":
        with vllm_sampler(model, upto, base_model, quantization) as opened:
            yield opened
        return
    loaded = load_any_model(model, upto=upto, base_model=base_model, quantization=quantization, device=device)
    prompt = loaded.prompt or usual_prompt(loaded.tokenizer)
    yield ModelSampler(loaded.model, loaded.tokenizer), PromptConfig.model_validate(prompt)


@contextmanager
def remote_sampler(
    model: str, server: SampleServer, agree: Callable[[Estimate], None], upto: str | None = None,
    base_model: str | None = None,
) -> Iterator[tuple[ServerSampler, PromptConfig]]:  # fmt: skip
    """A sampler for a server of `model`, of which only the tokenizer and the prompt template are loaded.

    Args:
        model: What the server serves, see `load_any_model`; so are the arguments after `agree`.
        agree: See `ServerSampler`.

    Raises:
        UserError: There is no such model, or the server cannot be used.
    """
    stack, base, revision, prompt = local_stack(model), model, None, None
    digest: dict[str, Any] = {"of": model}
    if stack is not None:
        manifest = read_manifest(stack, upto)
        base, prompt = base_model or manifest.base["model"], manifest.prompt
        revision = None if base_model else manifest.base["revision"]
        digest = {"base": manifest.base, "adapters": {one.name: one.sha256 for one in manifest.adapters}}
    elif upto is not None:
        raise UserError("`upto` goes with a stack; this is a single model", where=model)
    try:
        path = resolve_model_path(base)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer of {base!r}: {reason}", fix="Check the path or Hub id.") from error
    prompt = prompt or usual_prompt(tokenizer)
    set_template_date(tokenizer, prompt.get("date"))
    sampler = ServerSampler(server, tokenizer, digest, context=context_length(config), agree=agree)
    yield sampler, PromptConfig.model_validate(prompt)


@contextmanager
def vllm_sampler(
    model: str,
    upto: str | None = None,
    base_model: str | None = None,
    quantization: str = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[tuple[Sampler, PromptConfig]]:
    """Like `open_sampler`, with vLLM.

    vLLM serves a single adapter, so the stack is concatenated into one in a temporary folder.

    Args:
        revision: Branch, tag or commit of the base on the Hub; a stack brings its own.

    Raises:
        UserError: vLLM is not installed, or cannot serve this base or adapter.
    """
    with tempfile.TemporaryDirectory() as folder:
        stack, adapter, prompt = local_stack(model), None, None
        base = base_model or model
        if stack is not None:
            manifest = read_manifest(stack, upto)
            base, prompt = base_model or manifest.base["model"], manifest.prompt
            revision = None if base_model else manifest.base["revision"]
            quantization = quantization_method(manifest.quantization)
            adapter = Path(folder) / "adapter"
            combine_stack(stack, adapter, upto=upto)
        if quantization not in ("none", "nf4"):
            raise UserError(
                f"vLLM does not support {quantization}", where=model, fix="Use the backend `transformers`."
            )
        path = resolve_model_path(base)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        set_template_date(tokenizer, (prompt or {}).get("date"))
        sampler = VllmSampler(
            path, tokenizer, adapter=adapter, revision=revision, quantized=quantization == "nf4",
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        try:
            yield sampler, PromptConfig.model_validate(prompt or usual_prompt(tokenizer))
        finally:
            sampler.close()
