"""The worlds to hold a contest in: pico-LLaMA with its own data, or a small real model on real rankings."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contest import data
from benchmarks.contest.data import Split, World
from benchmarks.contest.start import load_start
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_ranked
from tuna_peft.data.tokenize import encode_dataset
from tuna_peft.models.base.load import load_base

MAX_LENGTH = 256
_COLUMNS = {"instruction": "instruction", "completions": "responses[].text", "scores": "responses[].score"}
_PARTS = {"lists": "train[:400]", "validation": "train[400:460]", "test": "train[460:]"}


def pico() -> World:
    """After supervised fine-tuning; responses are graded by program."""
    start, tokenizer = load_start()
    return World(start, tokenizer, data.training_lists(tokenizer), data.validation(tokenizer), data.test(tokenizer))


def stories(folder: Path) -> World:
    """stories260K, as pre-trained, on AlpacaEval's ranked answers of real models, cut to 256 tokens with the prompt.

    Args:
        folder: Holds `checkpoints/stories260K` and `ranked/alpaca_eval.jsonl`.
    """
    base = load_base(str(folder / "checkpoints/stories260K"), device="cpu")
    parts = {}
    for name, split in _PARTS.items():
        source = DataSource.model_validate(
            {"path": str(folder / "ranked/alpaca_eval.jsonl"), "split": split, "columns": _COLUMNS,
             "on_bad_row": "skip"}
        )  # fmt: skip
        rows, _ = load_ranked(source, PromptConfig())
        # Three responses hold `</s>`; lenient, so that the data are those of the published results.
        encoded, _ = encode_dataset(
            rows, base.tokenizer, max_length=MAX_LENGTH, overflow="cut", on_bad_row="skip",
            prompt=PromptConfig(rendering="lenient"),
        )  # fmt: skip
        parts[name] = list(encoded)
    held_out = (Split(parts[name], batch_size=8) for name in ("validation", "test"))
    return World(base.model, base.tokenizer, parts["lists"], *held_out)
