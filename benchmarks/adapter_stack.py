"""Measures the cost of frozen adapters in a ranking step: `python -m benchmarks.adapter_stack --json FILE`.

Seconds of a ranking step of one CPU model with none, one and more frozen adapters below the trained one. Compared are
fused LoRA layers, which compute all adapters in one product, and PEFT's layers; their runs are interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.measure import Runner
from benchmarks.ranking_step import environment
from benchmarks.shapes import SHAPES, build, config_of
from benchmarks.workloads import WORKLOADS

ARMS = {"fused": "ours", "PEFT": "ours-peft-lora"}


def main(arguments: list[str] | None = None) -> int:
    """Prints seconds by number of adapters and kind of layer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_stack", description=__doc__)
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=[1, 2, 4], help="number of adapters, the trained one included"
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="short-varied")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    groups = WORKLOADS[options.workload].groups(1, config_of(options.shape).vocab_size)
    runners = {
        count: Runner(
            build(options.shape, "cpu", frozen_adapters=count - 1),
            "cpu",
            [groups],
            checkpointing=False,
            equal_lengths=False,
        )
        for count in options.adapters
    }
    seconds: dict[str, dict[int, list[float]]] = {kind: {count: [] for count in runners} for kind in ARMS}
    for repetition in range(options.repetitions + 1):
        for count, runner in runners.items():
            for kind, arm in ARMS.items():
                taken = runner.time(arm)
                if repetition:  # the first one warms up
                    seconds[kind][count].append(taken)
    medians = {kind: {count: statistics.median(t) for count, t in by.items()} for kind, by in seconds.items()}
    print(f"{options.shape}, {options.workload}, {torch.get_num_threads()} thread(s)")
    print(f"{'adapters':>10}" + "".join(f"{kind:>10}" for kind in ARMS))
    for count in runners:
        print(f"{count:10}" + "".join(f"{medians[kind][count]:10.3f}" for kind in ARMS))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"workload": options.workload, "environment": environment("cpu"), "median_seconds": medians}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
