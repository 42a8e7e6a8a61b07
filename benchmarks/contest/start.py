"""Where every arm starts: pico-LLaMA after the quickstart's supervised stage, its adapter merged, unquantised."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.contest.arms import on_lists
from benchmarks.contest.data import Row
from benchmarks.contest.objectives import nothing
from benchmarks.contest.train import LORA, trained
from tuna_peft.models.base.load import load_base
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run.inputs import read_inputs

CACHE = Path("runs/learning")
STEPS, BATCH, LEARNING_RATE = 120, 32, 1e-3


def load_start() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model after SFT, trained once and kept below `runs/`, and its tokenizer."""
    base = load_base("builtin:pico-llama", device="cpu")
    file = CACHE / "start.safetensors"
    if file.exists():
        base.model.load_state_dict(load_file(file), strict=False)  # the head is tied
        return base.model, base.tokenizer
    inputs = read_inputs(load_recipe("quickstart"), base.tokenizer, base.model.config)
    model, _ = trained(
        base.model, on_lists(nothing, "best"), supervised_lists(inputs.stages["sft"]),
        steps=STEPS, batch=BATCH, learning_rate=LEARNING_RATE, seed=0, lora={**LORA, "r": 16, "lora_alpha": 32},
    )  # fmt: skip
    CACHE.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(state, file)
    return model, base.tokenizer


def supervised_lists(rows: Iterable[Row]) -> list[Row]:
    """Supervised rows as lists of one."""
    return [_as_list(row) for row in rows]


def _as_list(row: Row) -> Row:
    prompt = row["completion_mask"].index(1)
    return {
        "prompt_ids": row["input_ids"][:prompt],
        "completions_ids": [row["input_ids"][prompt:]],
        "completion_skips": [0],
        "ranks": [0],
    }
