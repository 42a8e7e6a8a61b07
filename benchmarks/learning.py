"""Compares training objectives on ranked responses: `python -m benchmarks.learning --json FILE`.

Appends each run to FILE when it ends and skips runs that are in FILE already, so it may be stopped at any time.
`--table` prints the results. See `docs/results.md` for the setup.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets.utils import logging as datasets_logging

from benchmarks.contest import worlds
from benchmarks.contest.ablation import ABLATIONS
from benchmarks.contest.ablation import STEPS as STAGE_STEPS
from benchmarks.contest.ablation import run as run_ablation
from benchmarks.contest.arms import ARMS
from benchmarks.contest.data import World
from benchmarks.contest.figure import save_figure
from benchmarks.contest.table import chosen_rate, print_table
from benchmarks.contest.train import flops_per_step, measured, timed, trained

RATES = (1e-3, 3e-3, 1e-2)
GRID_SEED = 100
BATCH = 8
REFERENCE = "tuna"  # its FLOPs are the budget of every arm in the comparison at equal compute
# Arms for the comparison at equal compute: those whose steps cost as much as the reference's are left out.
COMPUTE_ARMS = ("best-sft", "dpo-one-pair", "simpo-one-pair", "orpo-one-pair", "cpo-one-pair")
STEPS_ARMS = tuple(name for name in ARMS if name not in COMPUTE_ARMS or name == "best-sft")


class Contest:
    """The runs of one result file; see `run`."""

    def __init__(self, world: World, file: Path, seeds: int, steps: int) -> None:
        self.world, self.file, self.seeds, self.steps = world, file, seeds, steps
        self.records: list[dict[str, Any]] = read(file)

    def run(self, budget: str, names: tuple[str, ...]) -> None:
        """For each arm: a validation run for each learning rate, then test runs of all seeds with the best rate."""
        self._baseline()
        for name in names:
            for rate in RATES:
                self._once(budget, name, rate, GRID_SEED, "validation")
            for seed in range(self.seeds):
                self._once(budget, name, chosen_rate(self.records, budget, name), seed, "test")

    def _once(self, budget: str, name: str, rate: float, seed: int, split: str) -> None:
        key = {"budget": budget, "arm": name, "learning_rate": rate, "seed": seed, "split": split}
        if any(key.items() <= record.items() for record in self.records):
            return
        steps = self.steps if budget == "steps" else self._affordable(name)
        (model, loss), seconds = timed(
            lambda: trained(
                self.world.start, ARMS[name].objective, self.world.lists,
                steps=steps, batch=BATCH, learning_rate=rate, seed=seed,
            )
        )  # fmt: skip
        figures = measured(model, self.world.tokenizer, getattr(self.world, split))
        flops = self._flops(name) * steps
        self._append(
            {**key, "steps": steps, "flops": flops, "cpu_seconds": round(seconds, 2), "loss": loss, **figures}
        )

    def _affordable(self, name: str) -> int:
        return round(self.steps * self._flops(REFERENCE) / self._flops(name))

    def _flops(self, name: str) -> float:
        for record in self.records:
            if record.get("flops_of") == name:
                return record["flops_per_step"]
        flops = flops_per_step(self.world.start, ARMS[name].objective, self.world.lists, BATCH)
        self._append({"flops_of": name, "flops_per_step": flops})
        return flops

    def _baseline(self) -> None:
        if not any(record.get("arm") == "start" for record in self.records):
            for split in ("validation", "test"):
                figures = measured(self.world.start, self.world.tokenizer, getattr(self.world, split))
                self._append({"budget": "none", "arm": "start", "split": split, "steps": 0, **figures})

    def _append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        append(self.file, record)


def ablate(file: Path, seeds: int) -> None:
    """The ablation of the stages, over seeds."""
    records = read(file)
    for seed in range(seeds):
        for name, ablation in ABLATIONS.items():
            key = {"budget": "stages", "arm": name, "seed": seed, "split": "test"}
            if not any(key.items() <= record.items() for record in records):
                steps = sum(STAGE_STEPS[stage] for stage in ablation.stages)
                append(file, {**key, "steps": steps, **run_ablation(ablation, seed)})


def append(file: Path, record: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """Appends a run to a file, and prints it but for the keys `without`."""
    cut_off = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * cut_off + json.dumps(record) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key not in without}), flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """The finished runs of a file; a line that a crash truncated is skipped."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="JSON lines, read and appended to")
    parser.add_argument(
        "--budget",
        choices=["steps", "compute", "stages"],
        default="steps",
        help="what is equal for all arms; `stages` runs the ablation of the stages instead",
    )
    parser.add_argument("--seeds", type=int, default=5, help="final runs of an arm")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 prompts")
    parser.add_argument("--stories", type=Path, metavar="FOLDER", help="stories260K and its rankings, not pico-LLaMA")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all of the budget's")
    parser.add_argument("--table", action="store_true", help="print the results in FILE and run nothing")
    parser.add_argument("--figure", type=Path, metavar="SVG", help="with --table: also draw a figure")
    options = parser.parse_args(arguments)
    if not options.table:
        torch.set_num_threads(1)
        datasets_logging.disable_progress_bar()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        if options.budget == "stages":
            ablate(options.json, options.seeds)
            return 0
        defaults = STEPS_ARMS if options.budget == "steps" else COMPUTE_ARMS
        world = worlds.stories(options.stories) if options.stories else worlds.pico()
        Contest(world, options.json, options.seeds, options.steps).run(options.budget, tuple(options.arms or defaults))
    print_table(read(options.json))
    if options.figure:
        save_figure(read(options.json), options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
