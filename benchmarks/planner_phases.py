"""Compares planned peaks of other phases with those measured on meta: `python -m benchmarks.planner_phases`.

Supervised steps, scoring and generation by the run's own model and by a teacher or judge in 16 bits, and the logits of
a whole text, at the full width of real models, cut to a few layers: what layers hold adds up. Exit code 1 when a peak
is off by more than 10 %, or under by more than 3 %, or FLOPs by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks import meta_phases
from benchmarks.planner import PRECISION, Case, adapter_of, config_of, measured
from benchmarks.shapes import build, build_plain
from benchmarks.workloads import Workload as Groups
from tuna_peft.planning.flops import sft_flops
from tuna_peft.planning.memory import activation_bytes, generation_bytes, logits_bytes, scoring_bytes
from tuna_peft.planning.shapes import KNOWN, ModelShape
from tuna_peft.planning.workload import Row, Workload, packed_pass, padded_pass

MODELS = ("llama-7b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-8b", "gemma-3-1b", "phi-3-mini", "phi-4")
LAYERS = 6
_SUPERVISED = (((512, 400, 300, 300), 200), ((256, 200) * 8, 100))  # lengths of rows, tokens of each that carry loss
_SCORED = ((4, 60), (4, 200), (1, 200))  # groups, tokens of a response
# Lengths of prompts, responses to each, new tokens, greedy, top_p.
_GENERATED = (
    ((300, 280, 200, 100), 1, 200, True, 1.0), ((300, 280, 200, 100), 4, 200, False, 1.0),
    ((600, 599) * 8, 1, 70, False, 0.9), ((30, 28) * 64, 1, 30, False, 1.0), ((30, 28) * 64, 1, 30, False, 0.9),
    ((30, 28) * 16, 1, 30, True, 1.0),
)  # fmt: skip
# Of a model in 16 bits without adapters: what a teacher scores, and what a judge is asked and answers.
_TEACHER, _JUDGE = (4, 200), ((1500, 1400) * 4, 1, 70, False, 1.0)
_TEXT = 500  # tokens whose logits are all made


def cases(shape: ModelShape, *, name: str, brief: bool = False) -> Iterator[Case]:
    """What is planned and how it is measured.

    Args:
        brief: One or two cases of each kind.
    """
    with_adapter = functools.cache(lambda: build(config_of(shape), "meta"))
    plain = functools.cache(lambda: build_plain(config_of(shape), "meta"))
    yield from _supervised(shape, name, with_adapter, brief)
    for scored in _SCORED[: 1 if brief else None]:
        yield _scoring(shape, name, with_adapter, scored)
    for generated in _GENERATED[3:4] if brief else _GENERATED:
        yield _generation(shape, name, with_adapter, generated)
    yield _scoring(shape, name, plain, _TEACHER, wide=True)
    yield _generation(shape, name, plain, ((300,) * 8, *_JUDGE[1:]) if brief else _JUDGE, wide=True)
    yield Case(
        name, f"all logits of {_TEXT} tokens", logits_bytes(shape, _TEXT, PRECISION),
        lambda: (meta_phases.logits(with_adapter(), _TEXT), 0.0),
    )  # fmt: skip


def _supervised(shape: ModelShape, name: str, model: Any, brief: bool) -> Iterator[Case]:
    own = adapter_of(shape)
    for lengths, targets in _SUPERVISED[: 1 if brief else None]:
        rows = [Row(length - targets, (targets,)) for length in lengths]
        # On meta every token is taken to carry loss.
        batch = dataclasses.replace(padded_pass(rows, len(rows)), targets=len(rows) * max(lengths))
        for kept in (0, shape.layers):
            even = Workload((Row(0, (batch.width,)),), 1, "")

            def measure(lengths=lengths, kept=kept, targets=targets) -> tuple[float, float]:
                peak, flops = meta_phases.supervised(model(), lengths, recompute=kept == 0, targets=targets)
                return peak, flops.model

            yield Case(
                name, f"{len(rows)} x {max(lengths)} supervised, {'all' if kept else 'no'} layers kept",
                activation_bytes(shape, batch, PRECISION, own, unchecked=kept, supervised=True), measure,
                len(rows) * sft_flops(shape, even, own, unchecked=kept),
            )  # fmt: skip


def _scoring(shape: ModelShape, name: str, model: Any, scored: tuple[int, int], *, wide: bool = False) -> Case:
    count, mean = scored
    batch = packed_pass([Row(100, (mean,) * 5)], count, None)

    def measure() -> tuple[float, float]:
        return meta_phases.scoring(model(), Groups("scored", 100, mean=mean).groups(count, shape.vocab)), 0.0

    who = "teacher in 16 bits scores" if wide else "scoring"
    return Case(name, f"{who} {count} x 5 x {mean}", scoring_bytes(shape, batch, _precision(wide)), measure)


def _generation(shape: ModelShape, name: str, model: Any, generated: Any, *, wide: bool = False) -> Case:
    lengths, n, new, greedy, top_p = generated
    parts = generation_bytes(
        shape, _precision(wide), prompts=len(lengths), n=n, prompt=max(lengths), new=new, greedy=greedy,
        top_p=top_p < 1,
    )  # fmt: skip

    def measure() -> tuple[float, float]:
        return meta_phases.generation(model(), lengths, n=n, new=new, greedy=greedy, top_p=top_p), 0.0

    how = "greedy" if greedy else f"top_p {top_p}"
    policy = f"{len(lengths)} x {n} of {new} behind {max(lengths)}, {how}"
    return Case(name, f"judge in 16 bits: {policy}" if wide else policy, sum(parts.values()), measure)


def _precision(wide: bool) -> Any:
    return dataclasses.replace(PRECISION, method="none") if wide else PRECISION


def all_cases(models: tuple[str, ...] = MODELS, layers: int = LAYERS) -> Iterator[Case]:
    """Those of docs/planning.md."""
    for model in models:
        yield from cases(dataclasses.replace(KNOWN[model], layers=layers), name=model)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=KNOWN)
    parser.add_argument("--layers", type=int, default=LAYERS, help="Cut every model to this many layers.")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = measured(all_cases(tuple(options.models), options.layers))
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
