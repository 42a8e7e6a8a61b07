"""The recipe of SmolLM2-135M on the real model, with cut sizes: SMOLLM2 names its folder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tuna_peft.models.stack.any_model import load_any_model
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run.pipeline import run_recipe

MODEL = Path(os.environ.get("SMOLLM2", ""))
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="SMOLLM2 does not name a folder with SmolLM2-135M")
def test_three_stages_on_the_real_model(tmp_path):
    records = [
        {"id": country, "instruction": f"What is the capital of {country}?", "input": "",
         "output": f"The capital of {country} is {capital}."}
        for country, capital in CAPITALS.items()
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    instance = {"task": "task1_capitals", "category": "x", "id": "task1-a", "definition": ["Name the capital."],
                "positive_examples": [], "input": "France", "output": ["Paris"]}  # fmt: skip
    (tmp_path / "superni.jsonl").write_text(json.dumps(instance) + "\n")
    overrides = [f"base.model={MODEL}", "base.dtype=float32", f"stages.sft.data.path={data}"]
    for stage in ("probabilistic", "contextual"):
        overrides += [f"stages.{stage}.data.prompts.path={data}", f"stages.{stage}.data.sample.n=4"]
        overrides += [f"stages.{stage}.data.sample.max_new_tokens=10"]
    overrides += [f"stages.probabilistic.data.score.model={MODEL}"]
    for stage in ("sft", "probabilistic", "contextual"):
        overrides += [f"stages.{stage}.train.max_steps=2", f"stages.{stage}.train.per_device_train_batch_size=2"]
    overrides += [f"evaluation.tasks.graded.path={data}", f"evaluation.tasks.superni.path={tmp_path}/superni.jsonl"]
    overrides += [f"evaluation.tasks.{task}.max_new_tokens=10" for task in ("graded", "superni")]
    report = run_recipe(load_recipe("smollm2-135m", overrides), tmp_path / "run")

    assert list(report["evaluation"]) == ["base", "sft", "probabilistic", "contextual"]
    assert all(report["stages"][name]["steps"] == 2 for name in list(report["evaluation"])[1:])
    assert all(math.isfinite(report["stages"][name]["train_loss"]) for name in list(report["evaluation"])[1:])
    for tasks in report["evaluation"].values():
        assert 0 <= tasks["graded"]["metrics"]["grade"]["value"] <= 1
    loaded = load_any_model(str(tmp_path / "run"), base_model=str(MODEL))
    assert loaded.names == ["sft", "probabilistic", "contextual"]
    weights = dict(loaded.model.named_parameters())
    for name in loaded.names:  # LoRA's B starts at zero
        assert any(weight.abs().sum() > 0 for key, weight in weights.items() if f"lora_B.{name}." in key)
    # fp32 on the CPU: the combined adapter computes the same sums in another order.
    assert report["exports"]["combined"]["divergence"]["kl_mean"] <= 1e-8
