"""Plots FLOPs of a prompt with its responses over unique tokens (LLaMA-7B): `python -m benchmarks.linearity FILE`."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt

from benchmarks.arms import ARMS, to_device
from benchmarks.flops import counted
from benchmarks.meta import meta_step
from benchmarks.shapes import build, set_checkpointing
from benchmarks.workloads import Workload

RESPONSES = (2, 4, 8, 16)
PROMPTS = (50, 400, 1600)


def main(file: str) -> int:
    """Counts all points and saves the plot."""
    model = build("7b", "meta")
    set_checkpointing(model, True)
    for responses in RESPONSES:
        points = [_point(model, Workload("linearity", prompt, responses=responses)) for prompt in PROMPTS]
        for tokens, flops in points:
            print(
                f"N={responses:2} {tokens:5} unique tokens {flops:8.2f} TFLOP {1000 * flops / tokens:6.2f} GFLOP/token"
            )
        plt.scatter([tokens for tokens, _ in points], [flops for _, flops in points], label=f"N = {responses}")
    plt.xlabel("unique tokens of a group")
    plt.ylabel("TFLOP a group, checkpointed")
    plt.xlim(0)
    plt.ylim(0)
    plt.legend()
    plt.savefig(file)
    return 0


def _point(model, workload: Workload) -> tuple[int, float]:
    groups = workload.groups(1, 32_000)
    loss = ARMS["ours"].loss(model, "meta")
    batch = to_device(ARMS["ours"].batch(groups), "meta")
    loss.keywords["responses"] = workload.responses  # type: ignore[attr-defined]
    with counted() as flops, meta_step(equal_lengths=True):
        loss(batch).backward()
    return workload.prompt + workload.responses * workload.mean, flops.model / 1e12


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
