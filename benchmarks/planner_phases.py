"""Compares planned and simulated peak memory of all phases but ranking: `python -m benchmarks.planner_phases`.

The phases are supervised steps, scoring and generation by the run's own model and by a 16-bit teacher or judge, and
the logits of a whole text. They are simulated on the `meta` device at the full width of real models, cut to a few
layers, as memory grows linearly with layers. Exits with 1 when a planned peak is more than 10 % above or 3 % below the
simulated one, or FLOPs differ by more than 10 %.
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
_SUPERVISED = (((512, 400, 300, 300), 200), ((256, 200) * 8, 100))  # tokens of each example, and those with a loss
_SCORED = ((4, 60), (4, 200), (1, 200))  # prompts, tokens of each of five responses
# Lengths of prompts, responses to each, tokens of a response, greedy, top_p.
_GENERATED = (
    ((300, 280, 200, 100), 1, 200, True, 1.0), ((300, 280, 200, 100), 4, 200, False, 1.0),
    ((600, 599) * 8, 1, 70, False, 0.9), ((30, 28) * 64, 1, 30, False, 1.0), ((30, 28) * 64, 1, 30, False, 0.9),
    ((30, 28) * 16, 1, 30, True, 1.0),
)  # fmt: skip
# The same for a 16-bit model without adapters: what a teacher scores, and what a judge reads and answers.
_TEACHER, _JUDGE = (4, 200), ((1500, 1400) * 4, 1, 70, False, 1.0)
_TEXT = 500  # tokens of the text whose logits are computed at once


def cases(shape: ModelShape, *, name: str, brief: bool = False) -> Iterator[Case]:
    """The cases of a model: planned bytes, and how they are measured.

    Args:
        shape: The sizes of the model.
        name: Its name in the tables.
        brief: Only one or two cases of each kind, for a test.
    """
    with_adapter = functools.cache(lambda: build(config_of(shape), "meta"))
    plain = functools.cache(lambda: build_plain(config_of(shape), "meta"))
    yield from _supervised(shape, name, with_adapter, brief)
    for scored in _SCORED[: 1 if brief else None]:
        yield _scoring(shape, name, with_adapter, scored)
    for generated in _GENERATED[3:4] if brief else _GENERATED:
        yield _generation(shape, name, with_adapter, generated)
    yield _scoring(shape, name, plain, _TEACHER, unquantized=True)
    yield _generation(shape, name, plain, ((300,) * 8, *_JUDGE[1:]) if brief else _JUDGE, unquantized=True)
    yield Case(
        name, f"all logits of {_TEXT} tokens", logits_bytes(shape, _TEXT, PRECISION),
        lambda: (meta_phases.logits(with_adapter(), _TEXT), 0.0),
    )  # fmt: skip


def _supervised(shape: ModelShape, name: str, model: Any, brief: bool) -> Iterator[Case]:
    own = adapter_of(shape)
    for lengths, targets in _SUPERVISED[: 1 if brief else None]:
        rows = [Row(length - targets, (targets,)) for length in lengths]
        # On the `meta` device labels have no values: every token counts as one with a loss.
        batch = dataclasses.replace(padded_pass(rows, len(rows)), targets=len(rows) * max(lengths))
        for kept in (0, shape.layers):
            even = Workload((Row(0, (batch.width,)),), 1, "")

            def measure(lengths=lengths, kept=kept, targets=targets) -> tuple[float, float]:
                peak, flops = meta_phases.supervised(model(), lengths, recompute=kept == 0, targets=targets)
                return peak, flops.model

            yield Case(
                name, f"supervised, {len(rows)} x {max(lengths)} tokens, {'all' if kept else 'no'} layers kept",
                activation_bytes(shape, batch, PRECISION, own, kept_layers=kept, supervised=True), measure,
                len(rows) * sft_flops(shape, even, own, kept_layers=kept),
            )  # fmt: skip


def _scoring(shape: ModelShape, name: str, model: Any, scored: tuple[int, int], *, unquantized: bool = False) -> Case:
    count, mean = scored
    batch = packed_pass([Row(100, (mean,) * 5)], count, None)

    def measure() -> tuple[float, float]:
        return meta_phases.scoring(model(), Groups("scored", 100, mean=mean).groups(count, shape.vocab)), 0.0

    kind = "scoring by a 16-bit teacher" if unquantized else "scoring"
    return Case(
        name,
        f"{kind}, {count} prompts x 5 responses x {mean} tokens",
        scoring_bytes(shape, batch, _precision(unquantized)),
        measure,
    )


def _generation(shape: ModelShape, name: str, model: Any, generated: Any, *, unquantized: bool = False) -> Case:
    lengths, n, new, greedy, top_p = generated
    parts = generation_bytes(
        shape, _precision(unquantized), prompts=len(lengths), n=n, prompt=max(lengths), new=new, greedy=greedy,
        top_p=top_p < 1,
    )  # fmt: skip

    def measure() -> tuple[float, float]:
        return meta_phases.generation(model(), lengths, n=n, new=new, greedy=greedy, top_p=top_p), 0.0

    kind = "generation by a 16-bit judge" if unquantized else "generation"
    sizes = f"{len(lengths)} prompts of {max(lengths)} tokens x {n} responses of {new}"
    policy = f"{kind}, {sizes}, {'greedy' if greedy else f'top_p {top_p}'}"
    return Case(name, policy, sum(parts.values()), measure)


def _precision(unquantized: bool) -> Any:
    return dataclasses.replace(PRECISION, method="none") if unquantized else PRECISION


def all_cases(models: tuple[str, ...] = MODELS, layers: int = LAYERS) -> Iterator[Case]:
    """The cases of docs/planner-accuracy.md."""
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
