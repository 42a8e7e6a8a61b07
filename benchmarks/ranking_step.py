"""Measures the ranking step: `python -m benchmarks.ranking_step --device meta --shape 7b --workload long --json FILE`.

Results are printed as a table and added to FILE. `python -m benchmarks.report FILE` compares a file with the goals.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import Disagreement, require_agreement
from benchmarks.arms import ARMS
from benchmarks.flops import limit, training_state_bytes, weight_bytes
from benchmarks.measure import Figures, Runner
from benchmarks.report import key_of, print_run
from benchmarks.shapes import SHAPES, build, config_of
from benchmarks.workloads import WORKLOADS, Workload, response_tokens

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 1 when the arms disagree."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        agreement = require_agreement(options.arms)
    except Disagreement as error:
        print(error, file=sys.stderr)
        return 1
    run = measure(
        WORKLOADS[options.workload],
        options.device,
        options.shape,
        options.arms,
        groups=options.groups,
        groups_per_batch=options.groups_per_batch,
        repetitions=options.repetitions,
        checkpointing=options.checkpointing,
        seed=options.seed,
    )
    run["agreement"] = agreement
    print_run(run)
    if options.json:
        save(options.json, run)
    return 0


def measure(
    workload: Workload,
    device: str,
    shape: str,
    names: list[str],
    *,
    groups: int,
    groups_per_batch: int = 1,
    repetitions: int = 3,
    checkpointing: bool = False,
    seed: int = 0,
    model: Any = None,
) -> dict[str, Any]:
    """Results of one workload on one device, as JSON values; `model` is one of that shape, built if there is none."""
    config = config_of(shape)
    everything = workload.groups(groups, config.vocab_size, seed)
    micro_batches = [everything[i : i + groups_per_batch] for i in range(0, groups, groups_per_batch)]
    model = model or build(shape, device)
    runner = Runner(model, device, micro_batches, checkpointing=checkpointing, equal_lengths=not workload.varied)
    figures: dict[str, Figures] = {name: runner.count(name) for name in names}
    if device != "meta":
        for repetition in range(repetitions):
            # Interleaved, every other repetition in reverse order, so that drift affects all arms alike.
            for name in names if repetition % 2 == 0 else reversed(names):
                figures[name].seconds.append(runner.time(name))
    return {
        "device": device,
        "shape": shape,
        "workload": workload.name,
        "groups": groups,
        "groups_per_batch": groups_per_batch,
        "seed": seed,
        "response_tokens": response_tokens(everything),
        "limit_flops": limit(config, everything),
        "peak_flops_per_second": peak_flops(device),
        "weight_bytes": weight_bytes(config),
        "training_state_bytes": training_state_bytes(config),
        "environment": environment(device),
        "arms": {name: figure.as_dict() for name, figure in figures.items()},
    }


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions that the results depend on."""
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def save(file: Path, run: dict[str, Any]) -> None:
    """Adds a run to a machine's file; replaces an earlier run of the same device, shape and workload."""
    runs = json.loads(file.read_text())["runs"] if file.exists() else {}
    runs[key_of(run)] = run
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"runs": dict(sorted(runs.items()))}, indent=1) + "\n")


def peak_flops(device: str) -> float | None:
    """FLOP/s of a large matrix product on this machine, in the dtype of the layers."""
    if device == "meta":
        return None
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking_step", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda", "meta"], required=True)
    parser.add_argument("--workload", choices=list(WORKLOADS), required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--shape", choices=SHAPES, help="default: small on a CPU, else 7b")
    parser.add_argument("--groups", type=int, default=1, help="prompts in a step")
    parser.add_argument("--groups-per-batch", type=int, default=1, help="prompts in a forward pass")
    parser.add_argument("--repetitions", type=int, default=3, help="timed steps of each arm")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="default: off on a CPU, else on"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.shape = options.shape or ("small" if options.device == "cpu" else "7b")
    if options.checkpointing is None:
        options.checkpointing = options.device != "cpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
