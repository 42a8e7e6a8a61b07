"""Reads, checks and tokenizes ranked chat data: `python -m benchmarks.reading TOKENIZER [ROWS]`.

Prints seconds of processor time and the peak of resident memory. The rows are the same for the same number: five
responses of 20 to 200 words to a prompt of two messages.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import encode_source

RESPONSES = 5
ROWS = 100_000


def write_rows(file: Path, rows: int) -> None:
    """Writes ranked chat data of made-up words, the same for the same number of rows."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(fewest: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(fewest, most)))

    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            prompt = [{"role": "system", "content": text(3, 10)}, {"role": "user", "content": text(10, 60)}]
            responses = [text(20, 200) for _ in range(RESPONSES)]
            row = {"prompt": prompt, "completions": responses, "scores": list(range(RESPONSES))}
            out.write(json.dumps(row) + "\n")


def main(name: str, rows: int = ROWS) -> int:
    """Writes the rows to a temporary file, reads them back as a stage of a run does, and prints the cost."""
    tokenizer, config = AutoTokenizer.from_pretrained(name), PretrainedConfig()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranked.jsonl"
        write_rows(file, rows)
        began = time.process_time()
        dataset, _ = encode_source(
            DataSource(path=str(file)), PromptConfig(template="chat"), tokenizer, config, max_length=None,
            overflow="error",
        )  # fmt: skip
        seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(dataset)} rows of {RESPONSES} responses: {seconds:.1f} s of processor time, peak {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], *map(int, sys.argv[2:])))
