"""Reads, checks and tokenizes ranked chat data: `python -m benchmarks.reading TOKENIZER [ROWS ...] [--before FOLDER]`.

Prints, for each number of rows, seconds of processor time and the peak of resident memory, each measured in a process
of its own; with `--before`, also those of another version of the package, and their ratio. The rows are the same for
the same number: five responses of at most 100 words (`--words`) to a prompt of two messages. A tokenizer without a
chat template is given one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESPONSES = 5
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write_rows(file: Path, rows: int, most: int) -> None:
    """Writes ranked chat data of made-up words, the same for the same number of rows and the same most of words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 6))) for _ in range(5000)]

    def text(fewest: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(fewest, most)))

    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            prompt = [{"role": "system", "content": text(3, 10)}, {"role": "user", "content": text(5, most // 2)}]
            responses = [text(most // 5, most) for _ in range(RESPONSES)]
            row = {"prompt": prompt, "completions": responses, "scores": list(range(RESPONSES))}
            out.write(json.dumps(row) + "\n")


def read(name: str, file: str) -> tuple[float, float]:
    """Reads the rows as a stage of a run does: seconds of processor time, and peak of resident memory in GiB."""
    from transformers import AutoTokenizer, PretrainedConfig

    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.data.load import encode_source

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    began = time.process_time()
    encode_source(
        DataSource(path=file), PromptConfig(template="chat"), tokenizer, PretrainedConfig(), max_length=None,
        overflow="error",
    )  # fmt: skip
    return time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, file: str, package: str) -> tuple[float, float]:
    """`read` in a process of its own, with the package in the folder `package`."""
    call = "import reading, sys; print(*reading.read(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", call, name, file], cwd=package, stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{Path(__file__).parent}"},
    )  # fmt: skip
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak


def main() -> None:
    """Reads the command line, writes the rows to a temporary folder and prints a line for each number of rows."""
    parser = argparse.ArgumentParser(description="Times reading, checking and tokenizing ranked chat data.")
    parser.add_argument("tokenizer", type=os.path.abspath, help="a folder with a tokenizer")
    parser.add_argument("rows", type=int, nargs="*", default=[10_000, 50_000, 100_000])
    parser.add_argument("--words", type=int, default=100, help="most words of a response, at least 10")
    parser.add_argument("--before", type=os.path.abspath, help="another version of the package, to compare with")
    arguments = parser.parse_args()
    here = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            file = Path(folder) / f"{rows}.jsonl"
            write_rows(file, rows, arguments.words)
            seconds, peak = measure(arguments.tokenizer, str(file), here)
            line = f"{rows:,} rows of {RESPONSES} responses: {seconds:.1f} s of processor time, peak {peak:.2f} GiB"
            if arguments.before:
                old_seconds, old_peak = measure(arguments.tokenizer, str(file), arguments.before)
                line += f"; before: {old_seconds:.1f} s, {old_peak:.2f} GiB; {seconds / old_seconds:.2f} times as long"
            print(line, flush=True)


if __name__ == "__main__":
    main()
