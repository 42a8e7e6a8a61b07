"""Trains on rankings with a share of wrong lists: `python -m benchmarks.noise --json FILE`.

The question, the arms and the verdict are in `docs/experiments/noise.md`, written before the first run. Appends each
run to FILE when it ends, with the hash of its configuration, and skips runs whose hash is in FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from datasets.utils import logging as datasets_logging

from benchmarks.contest import data, objectives
from benchmarks.contest.arms import best_only, on_lists
from benchmarks.contest.data import Row
from benchmarks.contest.start import load_start
from benchmarks.contest.train import measured, timed, trained
from benchmarks.learning import append, read

ARMS = {
    "full": on_lists(objectives.ranking(), "best"),
    "two-bins": on_lists(objectives.in_two_bins(objectives.ranking()), "best"),
    "best-only": best_only(),
}
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)
RATES = (1e-3, 3e-3)
SEEDS, GRID_SEED, GRID_NOISE = range(5), 100, 0.2
STEPS, BATCH = 40, 8
METRICS = ("ranking_accuracy", "response_score")


def with_noise(rows: list[Row], probability: float, seed: int) -> list[Row]:
    """The lists, each with a wrong order with this probability.

    A wrong order exchanges ranks and scores between the responses until the ranks differ from the right ones.
    """
    rng = Random(f"{seed} {probability}")
    return [_wrong(row, rng) if rng.random() < probability else row for row in rows]


def _wrong(row: Row, rng: Random) -> Row:
    order = list(range(len(row["ranks"])))
    while [row["ranks"][i] for i in order] == row["ranks"]:
        rng.shuffle(order)
    return {**row, "ranks": [row["ranks"][i] for i in order], "scores": [row["scores"][i] for i in order]}


class Study:
    """The runs of one result file."""

    def __init__(self, file: Path) -> None:
        self.file, self.records = file, read(file)
        self.start, self.tokenizer = load_start()
        self.lists = data.training_lists(self.tokenizer, judge_error=0.0)
        self.splits = {"validation": data.validation(self.tokenizer), "test": data.test(self.tokenizer)}

    def run(self, seeds: Sequence[int]) -> None:
        """A validation run for each learning rate, then these seeds at every noise, seed by seed."""
        rates = {arm: self._best_rate(arm) for arm in ARMS}
        for seed in seeds:
            for probability in (NOISE[0], NOISE[-1], *NOISE[1:-1]):  # those that decide come first
                for arm in ARMS:
                    self._once(arm, probability, rates[arm], seed, "test")

    def _best_rate(self, arm: str) -> float:
        runs = [self._once(arm, GRID_NOISE, rate, GRID_SEED, "validation") for rate in RATES]
        return max(runs, key=lambda run: sum(run[metric] for metric in METRICS))["learning_rate"]

    def _once(self, arm: str, probability: float, rate: float, seed: int, split: str) -> dict[str, Any]:
        settings = {
            "arm": arm, "noise": probability, "learning_rate": rate, "seed": seed, "split": split, "steps": STEPS,
            "batch": BATCH,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        for record in self.records:
            if record["key"] == key:
                return record
        rows = with_noise(self.lists, probability, seed)
        (model, loss), seconds = timed(
            lambda: trained(
                self.start, ARMS[arm], rows, steps=STEPS, batch=BATCH, learning_rate=rate, seed=seed
            )
        )  # fmt: skip
        figures = measured(model, self.tokenizer, self.splits[split])
        record = {"key": key, **settings, "cpu_seconds": round(seconds, 2), "loss": loss, **figures}
        self.records.append(record)
        append(self.file, record)
        return record


def tables(records: list[dict[str, Any]]) -> str:
    """Means by arm and noise, and what the largest noise costs, as Markdown."""
    runs = {(r["arm"], r["noise"], r["seed"]): r for r in records if r["split"] == "test"}
    lines = []
    for metric in METRICS:
        lines += [
            f"| {metric} | " + " | ".join(f"p = {p:g}" for p in NOISE) + " | 0 minus 0.4 |",
            "|---|" + "---:|" * 6,
        ]
        losses = {}
        for arm in ARMS:
            values = {p: {s: runs[arm, p, s][metric] for s in SEEDS if (arm, p, s) in runs} for p in NOISE}
            paired = [s for s in values[NOISE[0]] if s in values[NOISE[-1]]]
            losses[arm] = {s: values[NOISE[0]][s] - values[NOISE[-1]][s] for s in paired}
            cells = [interval(list(values[p].values())) for p in NOISE] + [interval(list(losses[arm].values()))]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        for other in ("two-bins", "best-only"):
            differences = [losses["full"][s] - losses[other][s] for s in losses["full"] if s in losses[other]]
            lines.append(f"| full loses more than {other} by | | | | | | {interval(differences)} |")
        lines.append("")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Mean and half the width of the 95 % interval of Student's t, with the number of values."""
    quantiles = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # t(0.975) by number of values
    if len(values) not in quantiles:
        return f"{np.mean(values):.3f}" if values else ""
    half = quantiles[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="JSON lines, read and appended to")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="runs to make; several can share FILE"
    )
    parser.add_argument("--table", action="store_true", help="print the results in FILE and run nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        torch.set_num_threads(1)
        datasets_logging.disable_progress_bar()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        Study(options.json).run(options.seeds)
    print(tables(read(options.json)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
