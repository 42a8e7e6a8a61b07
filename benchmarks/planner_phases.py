"""Compares planned peaks of other phases with those measured on meta: `python -m benchmarks.planner_phases`.

Supervised steps, scoring and generation, at the full width of real models, cut to a few layers: what layers hold adds
up. Exit code 1 when a peak is off by more than 10 %, or under by more than 3 %, or FLOPs by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator

from benchmarks import meta_phases
from benchmarks.planner import PRECISION, Comparison, adapter_of, config_of
from benchmarks.shapes import build
from benchmarks.workloads import Workload as Groups
from tuna_peft.planning.flops import sft_flops
from tuna_peft.planning.inference import generation_bytes, scoring_bytes
from tuna_peft.planning.memory import activation_bytes
from tuna_peft.planning.shapes import KNOWN, ModelShape
from tuna_peft.planning.workload import Row, Workload, packed_pass, padded_pass

MODELS = ("llama-7b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-8b", "gemma-3-1b", "phi-3-mini", "phi-4")
_SUPERVISED = (((512, 400, 300, 300), 200), ((256, 200) * 8, 100))  # lengths of rows, tokens of each that carry loss
_SCORED = ((4, 60), (4, 200), (1, 200))  # groups, tokens of a response
# Lengths of prompts, responses to each, new tokens, greedy, top_p.
_GENERATED = (
    ((300, 280, 200, 100), 1, 200, True, 1.0), ((300, 280, 200, 100), 4, 200, False, 1.0),
    ((600, 599) * 8, 1, 70, False, 0.9), ((30, 28) * 64, 1, 30, False, 1.0), ((30, 28) * 64, 1, 30, False, 0.9),
)  # fmt: skip


def compare_phases(shape: ModelShape, *, name: str, brief: bool = False) -> Iterator[Comparison]:
    """Measures and predicts the phases.

    Args:
        brief: One or two cases of each.
    """
    yield from _supervised(shape, name, brief)
    model = build(config_of(shape), "meta")
    for count, mean in _SCORED[: 1 if brief else None]:
        measured = meta_phases.scoring(model, Groups("scored", 100, mean=mean).groups(count, shape.vocab))
        planned = scoring_bytes(shape, packed_pass([Row(100, (mean,) * 5)], count, None), PRECISION)
        yield Comparison(f"{name}, scoring {count} x 5 x {mean}", planned / measured - 1, 0.0, measured)
    for lengths, n, new, greedy, top_p in _GENERATED[3:4] if brief else _GENERATED:
        measured = meta_phases.generation(model, lengths, n=n, new=new, greedy=greedy, top_p=top_p)
        parts = generation_bytes(
            shape, PRECISION, prompts=len(lengths), n=n, prompt=max(lengths), new=new, greedy=greedy, top_p=top_p < 1
        )
        how = "greedy" if greedy else f"top_p {top_p}"
        case = f"{name}, {len(lengths)} x {n} of {new} behind {max(lengths)}, {how}"
        yield Comparison(case, sum(parts.values()) / measured - 1, 0.0, measured)


def _supervised(shape: ModelShape, name: str, brief: bool) -> Iterator[Comparison]:
    model, own = build(config_of(shape), "meta"), adapter_of(shape)
    for lengths, targets in _SUPERVISED[: 1 if brief else None]:
        rows = [Row(length - targets, (targets,)) for length in lengths]
        # On meta every token is taken to carry loss.
        batch = dataclasses.replace(padded_pass(rows, len(rows)), targets=len(rows) * max(lengths))
        for kept in (0, shape.layers):
            measured, flops = meta_phases.supervised(model, lengths, recompute=kept == 0, targets=targets)
            peak = activation_bytes(shape, batch, PRECISION, own, unchecked=kept, supervised=True)
            even = Workload((Row(0, (batch.width,)),), 1, "")
            planned = len(rows) * sft_flops(shape, even, own, unchecked=kept)
            case = f"{name}, {len(rows)} x {max(lengths)} supervised, {kept} of {shape.layers} kept"
            yield Comparison(case, peak / measured - 1, planned / flops.model - 1, measured)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=KNOWN)
    parser.add_argument("--layers", type=int, default=6, help="Cut every model to this many layers.")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = []
    print(f"{'case':58}{'measured GB':>12}{'peak':>9}{'FLOPs':>9}")
    for model in options.models:
        for result in compare_phases(dataclasses.replace(KNOWN[model], layers=options.layers), name=model):
            found.append(result)
            off = "" if result.holds else "  OFF"
            print(f"{result.case:58}{result.measured_bytes / 1e9:12.3f}{result.peak:+9.1%}{result.flops:+9.1%}{off}")
    print(f"{len(found)} cases: {min(one.peak for one in found):+.1%} to {max(one.peak for one in found):+.1%}")
    return 0 if all(result.holds for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
