"""Runs llama.cpp from the npm package `node-llama-cpp`, where `make verify-gguf` has installed it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch

LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", Path(__file__).parents[1] / "build" / "llama-cpp"))
IS_INSTALLED = (LLAMA_CPP / "node_modules" / "node-llama-cpp").is_dir() and shutil.which("node") is not None
NEW_TOKENS = 24


@dataclass
class Answer:
    """What llama.cpp says: `tokens` of the texts, `logits` per prompt `(seq, vocabulary)`, greedy continuations."""

    tokens: list[list[int]]
    adds_bos: bool
    logits: list[torch.Tensor]
    continuations: list[list[int]]


def ask(model: Path, prompts: list[list[int]], *, texts: list[str] | None = None, lora: Path | None = None) -> Answer:
    """Runs llama.cpp on a file, in a context of 256 tokens or what the file says if that is less."""
    fields = gguf.GGUFReader(model).fields
    [longest] = [field.contents() for key, field in fields.items() if key.endswith(".context_length")]
    request = {
        "model": str(model), "lora": str(lora) if lora else None, "texts": texts or [], "prompts": prompts,
        "newTokens": NEW_TOKENS, "contextSize": min(256, longest),
    }  # fmt: skip
    script = Path(__file__).with_suffix(".mjs")
    done = subprocess.run(
        ["node", str(script), str(LLAMA_CPP)], input=json.dumps(request), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return Answer(
        found["tokens"],
        found["addsBos"],
        [torch.tensor(rows, dtype=torch.float64) for rows in found["logits"]],
        found["continuations"],
    )
