"""Decoding by batch size, from NF4 weights and from a 16-bit copy of them."""

from __future__ import annotations

import random
import time
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu.steps import Arms, Setting
from benchmarks.shapes import build, config_of
from tuna_peft.models.generation.generate import stream_responses


def arms(setting: Setting) -> Arms:
    """Batches of 32, 128 and 256 sequences (a trial: 2 and 4)."""

    @cache
    def model() -> Any:
        return build(setting.shape, setting.device)

    sizes = (2, 4) if setting.toy else (32, 128, 256)
    return {
        f"{'bf16 copy' if dense else 'NF4'}, batch {size}": lambda dense=dense, size=size: decode(  # type: ignore[misc]
            setting, model(), size, dense
        )
        for size in sizes
        for dense in (False, True)
    }


def decode(setting: Setting, model: Any, size: int, dense: bool) -> dict[str, Any]:
    """Seconds of a step, from the difference of a long and a short generation after prompts of 128 tokens.

    EOS is never sampled. Making the copy and computing the prompts is in both.
    """
    short, long, prompt = (1, 4, 8) if setting.toy else (8, 72, 128)
    draw = random.Random(0)
    vocabulary = config_of(setting.shape).vocab_size
    prompts = [[draw.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(size)]
    # The first one is the warm-up.
    seconds = {tokens: _seconds(model, prompts, tokens, size, dense) for tokens in (short, short, long)}
    step = (seconds[long] - seconds[short]) / (long - short)
    found: dict[str, Any] = {
        "seconds_per_step": step,
        "tokens_per_second": size / step,
        "short_seconds": seconds[short],
    }
    if setting.device == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated()
    return found


def _seconds(model: Any, prompts: list[list[int]], tokens: int, size: int, dense: bool) -> float:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, decode=lambda ids, **options: "")
    model.generation_config.eos_token_id = None
    started = time.perf_counter()
    options = {"temperature": 1.0, "max_new_tokens": tokens, "batch_size": size, "dense": dense}
    found = list(stream_responses(model, tokenizer, prompts, **options))
    if {one.lengths[0] for one in found} != {tokens}:
        raise RuntimeError("not every sequence has as many tokens as it should")
    return time.perf_counter() - started  # the tokens are on the CPU, so the GPU is done
