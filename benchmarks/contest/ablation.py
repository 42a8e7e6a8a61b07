"""The stages of the method, one by one, together, in the other order, in one adapter, and on a 4-bit base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.contest import data, objectives
from benchmarks.contest.arms import on_lists
from benchmarks.contest.data import Row
from benchmarks.contest.start import supervised_lists
from benchmarks.contest.train import LORA, fit, measured
from tuna_peft.models.base.load import load_base, make_quantization_config
from tuna_peft.models.stack.adapters import push_adapter
from tuna_peft.models.stack.start import start_from_below
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run.inputs import read_inputs

STEPS = {"sft": 80, "probabilistic": 60, "contextual": 60}
BATCH = {"sft": 16, "probabilistic": 8, "contextual": 8}
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Ablation:
    """Stages in their order; whether each gets an adapter of its own; where it starts; how the base is stored."""

    label: str
    stages: Sequence[str]
    stacked: bool = True
    quantization: str = "none"
    from_below: bool = False
    ranking_rate: float = LEARNING_RATE


_ALL = ("sft", "probabilistic", "contextual")
ABLATIONS = {
    "sft": Ablation("SFT", _ALL[:1]),
    "probabilistic": Ablation("SFT, probabilistic", _ALL[:2]),
    "contextual": Ablation("SFT, contextual", ("sft", "contextual")),
    "both": Ablation("SFT, probabilistic, contextual: the method", _ALL),
    "reversed": Ablation("SFT, contextual, probabilistic: the other order", ("sft", "contextual", "probabilistic")),
    "one-adapter": Ablation("all three in one adapter", _ALL, stacked=False),
    "no-sft": Ablation("probabilistic, contextual, without SFT", _ALL[1:]),
    "from-below": Ablation("all three, each adapter starting from the stack below", _ALL, from_below=True),
    "double-rate": Ablation("all three, the ranking stages at twice the rate", _ALL, ranking_rate=2e-3),
    "one-adapter-double-rate": Ablation(
        "all three in one adapter, the ranking stages at twice the rate", _ALL, stacked=False, ranking_rate=2e-3
    ),
    "from-below-double-rate": Ablation(
        "all three, each adapter starting from the stack below, the ranking stages at twice the rate",
        _ALL,
        from_below=True,
        ranking_rate=2e-3,
    ),
    "nf4": Ablation("all three, stacked on NF4", _ALL, quantization="nf4"),
}


def run(ablation: Ablation, seed: int) -> dict[str, Any]:
    """Trains the stages of `ablation` and measures the result on the test set."""
    base = load_base(
        "builtin:pico-llama", device="cpu", quantization_config=make_quantization_config(ablation.quantization)
    )
    recipe = load_recipe("quickstart", ["stages.contextual.data={path: builtin:pico-llama/judge.json, format: judge}"])
    inputs = read_inputs(recipe, base.tokenizer, base.model.config)
    torch.manual_seed(seed)
    model: Any = base.model
    for place, stage in enumerate(ablation.stages):
        if ablation.stacked or place == 0:
            model = push_adapter(model, stage, LoraConfig(**LORA))
        if ablation.from_below and place:
            start_from_below(model)
        rows: list[Row] = list(inputs.stages[stage])
        objective = on_lists(objectives.ranking())
        if stage == "sft":
            rows, objective = supervised_lists(rows), on_lists(objectives.nothing)
        rate = LEARNING_RATE if stage == "sft" else ablation.ranking_rate
        fit(model, objective, rows, steps=STEPS[stage], batch=BATCH[stage], learning_rate=rate, seed=seed)
    return measured(model, base.tokenizer, data.test(base.tokenizer))
