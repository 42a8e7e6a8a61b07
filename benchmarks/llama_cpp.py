"""Measures sampling on a CPU beside llama.cpp, which serves the same weights from a GGUF file that we write.

    pip install xllamacpp
    python -m benchmarks.llama_cpp --model runs/mine/merged --json benchmarks/results/llama-cpp.json

Both generate `--batch` responses of equal length to one prompt at temperature 1, on `--threads` threads: ours by
`stream_responses`, llama.cpp by its server in this process, which answers as many requests at once. EOS is never
sampled. A step (one token of every response) is the difference of a long and a short generation, so neither reading
the prompt nor preparing weights is in it. Seconds are of processor time, which other work on the machine changes
little; the minimum over the repetitions, which are interleaved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tuna_peft.data.texts import prompt_ids
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.files import write_json
from tuna_peft.models.base.load import load_base
from tuna_peft.models.generation.generate import stream_responses

GOAL = 0.7
"""Our tokens per second over llama.cpp's."""
SHORT, LONG = 8, 40
PROMPT = [{"role": "user", "content": "Name three colors and say why you like them."}]


def ours(model: Any, ids: list[int], batch: int) -> Callable[[int], None]:
    """Generates `batch` responses of so many tokens."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, decode=lambda ids, **options: "")
    model.generation_config.eos_token_id = None

    def run(tokens: int) -> None:
        [found] = stream_responses(
            model, tokenizer, [ids], n=batch, temperature=1.0, max_new_tokens=tokens, batch_size=batch
        )
        assert found.lengths == [tokens] * batch

    return run


def llama_cpp(file: Path, batch: int, threads: int) -> Callable[[int], None]:
    """The same by llama.cpp's server, with a slot for each response."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx, params.verbosity = str(file), batch, 256 * batch, -1
    for one in (params.cpuparams, params.cpuparams_batch):
        one.n_threads, one.poll = threads, 0  # waiting threads would count as processor time
    server = xllamacpp.Server(params)

    def one(seed: int, tokens: int) -> None:
        request = {
            "messages": PROMPT, "max_tokens": tokens, "temperature": 1.0, "seed": seed, "ignore_eos": True, "top_k": 0,
            "top_p": 1.0, "min_p": 0.0, "cache_prompt": False,
        }  # fmt: skip
        assert server.handle_chat_completions(request)["usage"]["completion_tokens"] == tokens

    def run(tokens: int) -> None:
        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(one, range(batch), [tokens] * batch))

    return run


def measure(arms: dict[str, Callable[[int], None]], repetitions: int) -> dict[str, float]:
    """Seconds of processor time of a step of each arm."""
    found: dict[str, float] = {}
    for arm in arms.values():
        arm(2)  # the warm-up
    for _ in range(repetitions):
        for name, arm in arms.items():
            seconds = {}
            for tokens in (SHORT, LONG):
                started = time.process_time()
                arm(tokens)
                seconds[tokens] = time.process_time() - started
            found[name] = min(found.get(name, torch.inf), (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT))
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="A chat model without adapters.")
    parser.add_argument("--type", default="f32", choices=["f32", "f16", "bf16", "q8_0"], help="Of the GGUF file.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="Write the figures there.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = load_base(given.model, device="cpu", dtype="float32")
    ids, results = prompt_ids(PROMPT, base.tokenizer), {}
    print("| responses at once | ours, s a step | llama.cpp | ours, tokens/s over llama.cpp's |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        export_gguf(given.model, Path(folder) / "gguf", types=[given.type])
        [file] = (Path(folder) / "gguf").glob("*.gguf")
        for batch in given.batch:
            arms = {"ours": ours(base.model, ids, batch), "llama.cpp": llama_cpp(file, batch, given.threads)}
            results[batch] = found = measure(arms, given.repetitions)
            ratio = found["llama.cpp"] / found["ours"]
            verdict = "met" if ratio >= GOAL else f"missed (goal {GOAL})"
            print(f"| {batch} | {found['ours']:.3f} | {found['llama.cpp']:.3f} | {ratio:.2f}, {verdict} |", flush=True)
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key != "json"}
        write_json(given.json, {"settings": settings, "seconds_per_step": results})


if __name__ == "__main__":
    main()
