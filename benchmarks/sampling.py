"""Measures sampling n responses to a long prompt with a shared key-value cache, compared with n separate calls.

    python -m benchmarks.sampling --json benchmarks/results/sampling.json

Arms, with the same prompts and number of new tokens (end-of-sequence is never sampled):

- `shared`: `stream_responses` with n samples: each prompt is computed once;
- `independent`: n calls with one sample each, all prompts in a batch, as a loop over seeds would do it;
- `transformers`: `generate(num_return_sequences=n)`, which computes each prompt n times in one batch.

Seconds are the minimum over the repetitions, which are interleaved; FLOPs are counted by torch.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tuna_peft.files import write_json
from tuna_peft.models.generation.generate import stream_responses

GOAL = 0.6


def make_model(hidden: int, layers: int, vocabulary: int, context: int, device: str) -> LlamaForCausalLM:
    """A LLaMA with random weights, without end-of-sequence."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=context,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    model.generation_config = GenerationConfig()
    return model


def arms(model: Any, prompts: list[list[int]], n: int, new_tokens: int) -> dict[str, Callable[[], int]]:
    """Functions that generate n responses of `new_tokens` tokens for every prompt, and return the number of tokens."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, decode=lambda ids, **options: "")
    options = {"temperature": 1.0, "max_new_tokens": new_tokens}

    def ours(n: int, seed: int) -> int:
        found = stream_responses(model, tokenizer, prompts, n=n, seed=seed, batch_size=n * len(prompts), **options)
        return sum(sum(one.lengths) for one in found)

    def transformers() -> int:
        ids = torch.tensor(prompts, device=model.device)  # all have the same length
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
            num_return_sequences=n, **options,
        )  # fmt: skip
        return made[:, ids.shape[1] :].numel()

    return {
        "shared": lambda: ours(n, 0),
        "independent": lambda: sum(ours(1, seed) for seed in range(n)),
        "transformers": transformers,
    }


def measure(run: dict[str, Callable[[], int]], repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds and FLOPs of each arm."""
    results: dict[str, dict[str, float]] = {}
    for name, arm in run.items():
        with FlopCounterMode(display=False) as counter:
            tokens = arm()  # also the warm-up
        results[name] = {"tokens": tokens, "gflop": counter.get_total_flops() / 1e9, "seconds": float("inf")}
    for _ in range(repetitions):
        for name, arm in run.items():
            started = time.perf_counter()
            arm()
            results[name]["seconds"] = min(results[name]["seconds"], time.perf_counter() - started)
    return results


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="Write the figures there.")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    model = make_model(
        given.hidden, given.layers, given.vocabulary, given.prompt_tokens + given.new_tokens, given.device
    )
    draw = random.Random(0)
    prompts = [[draw.randrange(1, given.vocabulary) for _ in range(given.prompt_tokens)] for _ in range(given.prompts)]
    results = measure(arms(model, prompts, given.n, given.new_tokens), given.repetitions)
    print("| arm | tokens | GFLOP | seconds | of independent |\n|---|---|---|---|---|")
    for name, one in results.items():
        ratio = one["seconds"] / results["independent"]["seconds"]
        print(f"| {name} | {one['tokens']} | {one['gflop']:.1f} | {one['seconds']:.2f} | {ratio:.2f} |")
    ratio = results["shared"]["seconds"] / results["independent"]["seconds"]
    print(f"shared / independent: {ratio:.2f}, goal {GOAL}: {'met' if ratio <= GOAL else 'MISSED'}")
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key != "json"}
        name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
        write_json(given.json, {"settings": settings, "device": name, "threads": torch.get_num_threads(), **results})


if __name__ == "__main__":
    main()
