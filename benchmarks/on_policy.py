"""Compares the quickstart's contextual stage on samples of its own model with the same stage on other data.

    python -m benchmarks.on_policy --output on-policy.json --seeds 0 1 2

Only the data of that stage differs; earlier stages, steps and judge are equal. `on-policy` samples from the model of
the stage before, `off-policy` from the base with the same prompts, `file` is the shipped data with another model's
responses.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from tuna_peft.files import write_json, write_text
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run.pipeline import run_recipe

STAGE = "contextual"
ARMS = {
    "on-policy": [],
    "off-policy": [f"stages.{STAGE}.data.sample.from=base"],
    "file": [f"stages.{STAGE}.data={{path: builtin:pico-llama/judge.json, format: judge}}"],
}
NO_EXPORT = ["export.combine=false", "export.merge.enabled=false", "export.divergence_prompts=0"]


def compare(seed: int, overrides: list[str], folder: Path, arms: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """The measures of the stage before and of each arm; the earlier stages run once."""
    common = [*overrides, *NO_EXPORT, f"seed={seed}"]
    below = load_recipe("quickstart", common)
    below.stages = below.stages[:-1]
    report = run_recipe(below, folder / "below")
    found = {"below": _measures(report, below.stages[-1].name)}
    for name, changes in arms.items():
        arm = load_recipe("quickstart", [*common, *changes])
        place = folder / name
        if not place.exists():
            shutil.copytree(
                folder / "below", place, ignore=shutil.ignore_patterns(".lock", "report.*", "exports.json")
            )
            write_text(place / "recipe.yaml", dump_recipe(arm))
        found[name] = _measures(run_recipe(arm, place), STAGE)
    return found


def _measures(report: dict[str, Any], stage: str) -> dict[str, float]:
    tasks = report["evaluation"][stage]
    return {
        "pair accuracy": tasks["ranking"]["metrics"]["pair_accuracy"]["value"],
        "grade": tasks["graded"]["metrics"]["grade"]["value"],
    }


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: each arm over the seeds, and their mean."""
    seeds = list(results)
    lines = ["| data of the stage | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for arm in results[seeds[0]]:
        cells = [[results[seed][arm][measure] for seed in seeds] for measure in ("pair accuracy", "grade")]
        cells = [[*column, mean(column)] for column in cells]
        lines.append(f"| {arm} | " + " | ".join(f"{a:.3f} / {b:.3f}" for a, b in zip(*cells, strict=True)) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="A .json file.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--folder", type=Path, help="Folder for the runs, so that an interrupted benchmark can resume."
    )
    parser.add_argument("overrides", nargs="*", help="key=value for every run.")
    arguments = parser.parse_args()
    results: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for seed in arguments.seeds:
            arms = {name: ARMS[name] for name in arguments.arms}
            results[seed] = compare(seed, arguments.overrides, folder / str(seed), arms)
            write_json(arguments.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
