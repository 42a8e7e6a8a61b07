"""A run's folder like one of `tuna-peft run`, with random results and responses that try to inject HTML."""

from __future__ import annotations

import json
import random

from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.results import Exclusion, PromptResult, TaskResult, save_result

STAGES = ["sft", "probabilistic", "contextual"]
HARM = "</pre><script>console.error('ran')</script><img src=x onerror=console.error(1)> & \"quotes\" | # heading"
LONG = "a" * 300  # no place for a line break
PROMPTS = 40


def write_run(folder, stages=STAGES, finished=3):
    for number, stage in enumerate(["base", *stages[:finished]]):
        save_result(folder, stage, ranking(number))
        save_result(folder, stage, graded(number))
    for number, stage in enumerate(stages[:finished]):
        write(folder / f"stages/{stage}/done.json", summary(number))
        write(folder / f"stages/{stage}/log_history.json", log_history(number, ranks=4 if number else 0))
    write(folder / "run.json", facts(stages))
    (folder / "recipe.yaml").write_text("name: <b>run</b>\nstages: []\n")
    return folder


def write_evaluation(folder):
    """A folder like one of `tuna-peft evaluate MODEL`."""
    for result in (ranking(0), graded(0)):
        save_result(folder, "model", result)
    write(folder / "run.json", {**facts([]), "seed": None, "adapters": {}, "evaluated": ["model"]})
    return folder


def facts(stages):
    return {
        "name": "pico <run>",
        "seed": 3,
        "stages": stages,
        "base": {"model": "builtin:pico-llama", "revision": None, "fingerprint": "ab" * 32,
                 "quantization": {"method": "nf4"}},
        "data": {name: {"records": 100, "kept": 98, "tokens": {"longest": 70}} for name in stages},
        "environment": {"python": "3.11", "platform": "Linux", "gpu": None, "threads": 2,
                        "packages": {"tuna_peft": "0.1.0", "torch": "2.13.0"}},
    }  # fmt: skip


def ranking(number):
    rng = random.Random(7)  # the same prompts for every stage
    prompts = []
    for i in range(PROMPTS):
        v = [-1.2 - 0.3 * number * rank + rng.gauss(0, 0.5) for rank in range(4)]
        pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
        right = sum(v[a] > v[b] for a, b in pairs) / len(pairs)
        details = {"v": v, "ranks": [0, 1, 2, 3], "lengths": [5, 6, 7, 8]}
        prompts.append(
            PromptResult(f"r{i}", "A prompt", "said", {"pair_accuracy": right}, weight=len(pairs), details=details)
        )
    metric = mean_metric([p.scores["pair_accuracy"] for p in prompts], [p.weight for p in prompts])
    groups = {
        f"better / worse length: {name}": {"pair_accuracy": metric}
        for name in ("0 to 0.8", "0.8 to 1.25", "1.25 to inf")
    }
    metrics = {"pair_accuracy": metric, "prefers_longer": metric, "better_is_longer": metric}
    return TaskResult("ranking", "pair_accuracy", metrics, prompts, groups)


def graded(number):
    rng = random.Random(8)
    prompts = []
    for i in range(PROMPTS):
        score = min(1.0, max(0.0, rng.random() * 0.5 + 0.15 * number))
        response = {0: HARM, 1: LONG, 2: ""}.get(i, f"answer {number} to {i}")
        if i < 3:
            score = 1.0 if number == len(STAGES) else 0.0
        prompts.append(PromptResult(f"g{i}", HARM if i == 0 else f"Question {i}?\n\ninput", response, {"score": score},
                                    references=["right"]))  # fmt: skip
    metric = mean_metric([p.scores["score"] for p in prompts])
    return TaskResult("graded", "score", {"score": metric}, prompts,
                      excluded=[Exclusion.of("the grader failed: <oops>", ["g99"])])  # fmt: skip


def summary(number):
    return {"type": "ranking" if number else "sft", "steps": 20, "epochs": 1.0, "train_loss": 1.5, "tokens": 90_000,
            "seconds": 39.5 + number, "peak_memory_gib": 0.9, "trainable_parameters": 1000, "lora": {"r": 8},
            "resumed_from": None}  # fmt: skip


def log_history(number, ranks):
    entries = []
    for step in range(5, 125, 5):
        entry = {"step": step, "loss": 2.0 / step**0.3, "learning_rate": 1e-3 * (1 - step / 125)}
        if ranks:
            entry |= {"rank_loss": 1.0 / step**0.2, "ranking_accuracy": 0.6 + step / 600, "margin_satisfaction": 0.4}
            entry |= {f"scores/rank_{rank}": -1 - 0.002 * rank * step for rank in range(ranks)}
        else:
            entry["mean_token_accuracy"] = 0.5 + step / 500
        entries.append(entry)
    return [*entries, {"step": 120, "train_runtime": 1.0}]


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
