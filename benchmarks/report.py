"""Prints results and compares them with the goals: `python -m benchmarks.report benchmarks/results/*.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = dict[str, Any]
TRL = ("trl-cpo", "trl-dpo")


@dataclass(frozen=True)
class Goal:
    """A goal for one result.

    Attributes:
        what: Name of the result.
        run: `device/shape/workload`, and the number of prompts in a forward pass if it is not 1.
        value: Computes the result from a run; KeyError if an arm was not run.
        goal: The value to reach.
        at_least: Whether larger is better.
    """

    what: str
    run: str
    value: Callable[[Run], float]
    goal: float
    at_least: bool = True


def flops(run: Run, arm: str) -> float:
    """FLOPs of an arm; `trl` is the cheaper of the two TRL arms."""
    return _cheapest(run, arm, lambda figures: figures["flops"])


def seconds(run: Run, arm: str) -> float:
    """Median seconds of an arm; `trl` is the faster of the two TRL arms."""
    return _cheapest(run, arm, lambda figures: figures["median_seconds"])


def whole_run_bytes(run: Run, arm: str) -> float:
    """Bytes of weights, adapters, gradients, optimizer states, and the peak of a step beyond them."""
    return run["weight_bytes"] + run["training_state_bytes"] + run["arms"][arm]["peak_bytes"]


def _cheapest(run: Run, arm: str, figure: Callable[[Any], float]) -> float:
    names = [name for name in TRL if name in run["arms"]] if arm == "trl" else [arm]
    if not names:
        raise KeyError(arm)
    return min(figure(run["arms"][name]) for name in names)


def _flops_ratio(arm: str) -> Callable[[Run], float]:
    return lambda run: flops(run, arm) / flops(run, "ours")


def _time_ratio(arm: str) -> Callable[[Run], float]:
    return lambda run: seconds(run, arm) / seconds(run, _as_users(run))


def _as_users(run: Run) -> str:
    """The arm with the settings that users get; on a CPU `ours`, which recomputes nothing there."""
    return "ours-auto" if run["device"] == "cuda" else "ours"


def _to_limit(run: Run) -> float:
    return flops(run, "ours-no-checkpointing") / run["limit_flops"]


def _on_card(run: Run) -> float:
    return flops(run, "reference") / flops(run, "ours-24gb")


def _memory_ratio(run: Run) -> float:
    return run["arms"]["reference"]["peak_bytes"] / run["arms"]["ours"]["peak_bytes"]


def _whole_run(run: Run) -> float:
    return whole_run_bytes(run, "ours") / 1e9


def _utilisation(run: Run) -> float:
    return 100 * run["limit_flops"] / seconds(run, _as_users(run)) / run["peak_flops_per_second"]


GOALS = [
    Goal("FLOPs, reference / ours, short", "meta/7b/short", _flops_ratio("reference"), 1.28),
    Goal("FLOPs, reference / ours, long", "meta/7b/long", _flops_ratio("reference"), 2.05),
    Goal("FLOPs, TRL pairs / ours, short", "meta/7b/short", _flops_ratio("trl"), 2.05),
    Goal("FLOPs, TRL pairs / ours, long", "meta/7b/long", _flops_ratio("trl"), 3.25),
    Goal("FLOPs, reference / ours on 24 GB, short-varied", "meta/7b/short-varied", _on_card, 2.4),
    Goal("FLOPs, reference / ours on 24 GB, long-varied", "meta/7b/long-varied", _on_card, 3.6),
    Goal("FLOPs, ours without checkpointing / limit, short", "meta/7b/short", _to_limit, 1.07, False),
    Goal("FLOPs, ours without checkpointing / limit, long", "meta/7b/long", _to_limit, 1.07, False),
    Goal("CPU time, reference / ours, short-varied", "cpu/small/short-varied", _time_ratio("reference"), 2.0),
    Goal("CPU time, reference / ours, long-varied", "cpu/small/long-varied", _time_ratio("reference"), 4.0),
    Goal("the same, two groups a pass", "cpu/small/long-varied/2", _time_ratio("reference"), 4.0),
    Goal("CPU time, TRL pairs / ours, short-varied", "cpu/small/short-varied", _time_ratio("trl"), 2.5),
    Goal("CPU time, TRL pairs / ours, long-varied", "cpu/small/long-varied", _time_ratio("trl"), 5.5),
    Goal("the same, two groups a pass", "cpu/small/long-varied/2", _time_ratio("trl"), 5.5),
    Goal("peak beyond the weights, reference / ours, 7B long", "meta/7b/long", _memory_ratio, 2.9),
    Goal("peak beyond the weights, reference / ours, 8B long", "meta/8b/long", _memory_ratio, 8.0),
    Goal("whole run, LLaMA-7B, estimate, GB", "meta/7b/long", _whole_run, 5.5, False),
    Goal("whole run, Llama-3-8B, estimate, GB", "meta/8b/long", _whole_run, 7.5, False),
    Goal("whole run, LLaMA-13B, estimate, GB", "meta/13b/long", _whole_run, 10.0, False),
    Goal("GPU useful utilisation, 7B, long-varied, %", "cuda/7b/long-varied", _utilisation, 45.0),
    Goal("GPU time, reference / ours, long-varied", "cuda/7b/long-varied", _time_ratio("reference"), 3.0),
    Goal("GPU time, TRL pairs / ours, long-varied", "cuda/7b/long-varied", _time_ratio("trl"), 4.0),
]


def print_run(run: Run) -> None:
    """One line for each arm."""
    env = run["environment"]
    print(
        f"{run['device']}, shape {run['shape']}, {run['workload']}: {run['groups']} group(s), "
        f"{run['groups_per_batch']} a forward pass, {env['threads']} thread(s), torch {env['torch']}"
    )
    if run["device"] == "meta":
        print("simulated on the meta device: 16-bit layers replace NF4 ones; weights are counted, not allocated")
    print(f"limit {run['limit_flops'] / 1e12:.3f} TFLOP; fp32 agreement: {_agreement(run)}")
    print(
        f"{'arm':24}{'ckpt':>5}{'TFLOP':>9}{'x limit':>9}{'peak GB':>9}"
        f"{'s':>9}{'groups/s':>10}{'tok/s':>8}{'useful %':>10}"
    )
    for name, figures in run["arms"].items():
        line = (
            f"{name:24}{'yes' if figures['checkpointing'] else 'no':>5}{figures['flops'] / 1e12:9.3f}"
            f"{figures['flops'] / run['limit_flops']:9.3f}{figures['peak_bytes'] / 1e9:9.3f}"
        )
        if taken := figures["median_seconds"]:
            useful = 100 * run["limit_flops"] / taken / run["peak_flops_per_second"]
            line += f"{taken:9.3f}{run['groups'] / taken:10.3f}{run['response_tokens'] / taken:8.0f}{useful:10.1f}"
        print(line)


def print_goals(runs: dict[str, Run]) -> bool:
    """Prints every goal with its measured value; returns whether none was missed."""
    met = True
    print(f"{'goal':56}{'wanted':>10}{'measured':>10}")
    for goal in GOALS:
        wanted = f"{'>=' if goal.at_least else '<='} {goal.goal:g}"
        try:
            value = goal.value(runs[goal.run])
        except KeyError:
            print(f"{goal.what:56}{wanted:>10}{'-':>10}  not measured ({goal.run})")
            continue
        good = value >= goal.goal if goal.at_least else value <= goal.goal
        met &= good
        print(f"{goal.what:56}{wanted:>10}{value:10.3f}  {'met' if good else 'MISSED'}")
    return met


def _agreement(run: Run) -> str:
    if "agreement" not in run:
        return "not checked"
    return f"{max(run['agreement'].values()):.1e} at most" if run["agreement"] else "no arm has the reference's loss"


def runs_of(content: dict[str, Any]) -> dict[str, Run]:
    """The runs of a file, also of one by `benchmarks.gpu`, where each arm of a ranking step is a run of its own."""
    if "runs" in content:
        return content["runs"]
    runs: dict[str, Run] = {}
    for step, arms in content["steps"].items():
        for run in arms.values() if step.startswith("ranking") else ():
            if "arms" in run:  # it did not fail
                name = key_of(run)
                runs[name] = run | {"arms": runs.get(name, run)["arms"] | run["arms"]}
    return runs


def key_of(run: Run) -> str:
    """The run's key in a file, see `Goal.run`."""
    together = run["groups_per_batch"]
    return "/".join((run["device"], run["shape"], run["workload"], *([str(together)] if together > 1 else [])))


def main(files: list[str]) -> int:
    """Prints the runs and goals of each file."""
    for file in files:
        runs = runs_of(json.loads(Path(file).read_text()))
        for run in runs.values():
            print_run(run)
            print()
        print_goals(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
