"""Measures the overhead of an evaluation over pure generation: `python -m benchmarks.evaluation RUN`.

RUN is the folder of a run with `evaluation.tasks.graded`, such as the quickstart's. Two things are measured, in turn:

- `generation`: only the generation of each stage's responses;
- `evaluate`: `tuna-peft evaluate RUN --task graded` for the base and all stages, which also loads the base once,
  switches adapters, caches responses, grades them, computes confidence intervals and writes files.

The result is evaluate / (stages x mean generation of a stage); it is near 1 as the base is not loaded again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.load import load_prompts
from tuna_peft.data.texts import prompt_ids
from tuna_peft.models.generation.generate import generate_responses
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.models.stack.any_model import load_any_model
from tuna_peft.recipe.evaluation_schema import EvaluationSettings, TaskSettings
from tuna_peft.run.evaluate import evaluate_target
from tuna_peft.run.folder import read_run_recipe


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--path", help="other prompts, such as builtin:pico-llama/prompts.jsonl")
    parser.add_argument("--limit", type=int, help="use only the first N prompts")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args(arguments)
    settings = _settings(options.run, options.path, options.limit)
    by_stage: dict[str, list[float]] = {}
    totals = []
    for _ in range(options.repetitions):
        for stage, seconds in generation_seconds(options.run, settings).items():
            by_stage.setdefault(stage, []).append(seconds)
        totals.append(evaluate_seconds(options.run, settings))
    medians = {stage: statistics.median(seconds) for stage, seconds in by_stage.items()}
    total, generation = statistics.median(totals), sum(medians.values())
    for stage, seconds in medians.items():
        print(f"generation, {stage:16} {seconds:8.2f} s")
    print(f"evaluate, {len(medians)} stages        {total:8.2f} s")
    print(f"beyond generation           {total - generation:8.2f} s")
    print(f"evaluate / ({len(medians)} x one stage's generation) = {total / generation:.3f}")
    return 0


def generation_seconds(run: str, settings: EvaluationSettings) -> dict[str, float]:
    """Seconds of generation by stage, without loading the model and reading data."""
    graded = settings.tasks.graded
    assert graded is not None
    loaded = load_any_model(run)
    prompts, _ = load_prompts(graded, PromptConfig.model_validate(loaded.prompt))
    ids = [prompt_ids(prompt["prompt"], loaded.tokenizer) for prompt in prompts]
    seconds = {}
    for number, stage in enumerate(["base", *loaded.names]):
        with active_adapters(loaded.model, loaded.names[:number]):
            started = time.perf_counter()
            generate_responses(
                loaded.model, loaded.tokenizer, ids, max_new_tokens=graded.max_new_tokens,
                batch_size=settings.batch_size,
            )  # fmt: skip
            seconds[stage] = time.perf_counter() - started
    return seconds


def evaluate_seconds(run: str, settings: EvaluationSettings) -> float:
    """Seconds of a whole evaluation into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        evaluate_target(run, settings, Path(folder))
        return time.perf_counter() - started


def _settings(run: str, path: str | None, limit: int | None) -> EvaluationSettings:
    recipe = read_run_recipe(Path(run))
    settings = recipe.named_evaluation if recipe else None
    if settings is None or settings.tasks.graded is None:
        raise SystemExit(f"{run} is no run with evaluation.tasks.graded")
    graded = settings.tasks.graded
    graded.path, graded.limit = path or graded.path, limit or graded.limit
    return settings.model_copy(update={"tasks": TaskSettings(graded=graded)})


if __name__ == "__main__":
    raise SystemExit(main())
