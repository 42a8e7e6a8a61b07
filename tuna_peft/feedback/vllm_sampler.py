"""Sampling with vLLM (extra `vllm`), which generates many sequences at once much faster than transformers does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import SampleSettings
from tuna_peft.files import sha256
from tuna_peft.journal import Journal
from tuna_peft.limits import GIB, VLLM_LORA_RANKS, context_length, within_context
from tuna_peft.models.base.memory import free_memory
from tuna_peft.models.generation.generate import Generated
from tuna_peft.progress import tracked

_CUDA_CONTEXT = GIB
"""Memory that vLLM's process allocates before it measures the free memory, in bytes."""
UNFIT = (0, 33)
"""The first release that is known not to work: bitsandbytes moved to a plug-in, and PyTorch is pinned to 2.14."""
_CHUNK = 256
"""Prompts given to the engine at once. It schedules them itself; they are saved when all of them are finished."""


class VllmSampler:
    """Samples with a vLLM engine, see `tuna_peft.feedback.sampling.Sampler`.

    Except for rounding, a prompt's samples depend on its seed and not on the other prompts of a batch. They are not
    those of the transformers backend.

    Args:
        base: Hub id or folder of the base model.
        tokenizer: The base model's tokenizer.
        adapter: Folder of the stack as one adapter (see `tuna_peft.export.combine`); None samples from the base model.
        revision: Branch, tag or commit of the base.
        quantized: Quantize the base model to NF4 on loading, as for training.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: vLLM is not installed, or is a version that cannot do this, or does not support the adapter's rank.
    """

    def __init__(
        self,
        base: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: Path | None = None,
        revision: str | None = None,
        quantized: bool = False,
        trust_remote_code: bool = False,
    ):
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                "the backend `vllm` needs the package vllm",
                fix="Install it on a machine with a GPU (pip install vllm), or use `transformers`.",
            ) from error
        require_known(vllm.__version__)
        self.tokenizer, self._vllm = tokenizer, vllm
        self._options: dict[str, Any] = {"model": base, "revision": revision, "trust_remote_code": trust_remote_code}
        if quantized:
            self._options["quantization"] = "bitsandbytes"
        self._adapter = None
        if adapter is not None:
            self._options |= {"enable_lora": True, "max_lora_rank": lora_rank(adapter)}
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest("stack", 1, str(adapter))
        self.context = context_length(
            AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
        )
        self._engine: Any = None
        self.identity = {
            "backend": "vllm",
            "base": {"model": base, "revision": revision},
            "quantization": "bitsandbytes" if quantized else None,
            "adapters": None if adapter is None else sha256(adapter / "adapter_model.safetensors"),
        }

    def close(self) -> None:
        """Ends the engine and frees its GPU memory."""
        self._engine = None
        free_memory()  # also collects garbage, which ends an engine without references

    def _start(self, longest: int) -> None:
        """Starts the engine for prompts with responses of `longest` tokens: it keeps a cache for the model's whole
        context otherwise, which often does not fit.
        """
        length = within_context(longest, self.context)
        self._engine = self._vllm.LLM(**self._options, max_model_len=length, **_share_of_gpu())

    def settle(self, journal: Journal) -> None:
        """See `Sampler`: vLLM chooses its batches itself."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SampleSettings,
        *,
        temperature: float,
        seed: str,
        done: Container[int],
    ) -> Iterator[Generated]:
        """See `Sampler`."""
        missing = [index for index in range(len(prompts)) if index not in done]
        if missing and self._engine is None:  # later attempts are made for some of these prompts
            self._start(max(map(len, prompts)) + settings.max_new_tokens)
        chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
        for chunk in tracked(chunks, f"sampling, temperature {temperature:g}", "batches"):
            outputs = self._engine.generate(
                [{"prompt_token_ids": list(prompts[index])} for index in chunk],
                [
                    self._vllm.SamplingParams(
                        n=settings.n, temperature=temperature, top_p=settings.top_p,
                        max_tokens=settings.max_new_tokens, seed=seed_of(seed, prompts[index]),
                    )
                    for index in chunk
                ],
                lora_request=self._adapter,
                use_tqdm=False,
            )  # fmt: skip
            for index, output in zip(chunk, outputs, strict=True):
                yield Generated(
                    index,
                    [self._text(sample) for sample in output.outputs],
                    [len(sample.token_ids) for sample in output.outputs],
                    [sample.finish_reason == "stop" for sample in output.outputs],
                )

    def _text(self, sample: Any) -> str:
        # Decoded from tokens, so that white space and special tokens are treated as in the transformers backend.
        return self.tokenizer.decode(list(sample.token_ids), skip_special_tokens=True).strip()


def _share_of_gpu() -> dict[str, float]:
    """The share of the GPU's memory that vLLM may use.

    By default vLLM takes 90 % and does not start if this process, which holds the model in training, leaves less.
    """
    if not torch.cuda.is_initialized():
        return {}
    free_memory()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(min(0.9, max(free - _CUDA_CONTEXT, 0) / total), 3)}


def require_known(version: str) -> None:
    """UserError for a release of vLLM that is known not to work."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers >= UNFIT:
        raise UserError(
            f"vLLM {version} does not work in this process: from {UNFIT[0]}.{UNFIT[1]} on it has no bitsandbytes "
            "method and requires another PyTorch",
            fix="Sample from a server instead (`server`, docs/serving.md), or install an older vLLM.",
        )


def lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM accepts and that holds the adapter.

    Raises:
        UserError: There is none.
    """
    rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    fitting = [allowed for allowed in VLLM_LORA_RANKS if allowed >= rank]
    if not fitting:
        raise UserError(
            f"the combined adapter has rank {rank}, vLLM serves up to {VLLM_LORA_RANKS[-1]}",
            fix="Merge the stack and sample from the merged model, or use the backend `transformers`.",
        )
    return fitting[0]


def seed_of(seed: str, prompt: Sequence[int]) -> int:
    """A seed of 31 bits for an engine, another for every seed and prompt."""
    digest = hashlib.blake2b(f"{seed}\n{','.join(map(str, prompt))}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
