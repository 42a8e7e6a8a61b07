"""Compares planned and simulated peak memory of a ranking step: `python -m benchmarks.planner`.

The step runs on PyTorch's `meta` device at the full size of real models, without weights (`measure.Runner`). It
compares bytes beyond weights, adapters, gradients and optimizer states, and FLOPs. Exits with 1 when a planned peak
is more than 10 % above or 3 % below the simulated one, or FLOPs differ by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.measure import Runner
from benchmarks.shapes import LORA_RANK, build
from benchmarks.workloads import Workload as Groups
from tuna_peft.planning.flops import ranking_flops
from tuna_peft.planning.memory import Adapter, Precision, activation_bytes
from tuna_peft.planning.shapes import KNOWN, ModelShape
from tuna_peft.planning.workload import Row, Workload, packed_pass

PRECISION = Precision("nf4", double_quant=True, compute=2)
MODELS = (
    "llama-3.2-1b", "llama-3.2-3b", "llama-7b", "llama-3.1-8b", "qwen3-8b", "llama-13b", "llama-3.1-70b", "gemma-3-1b",
    "phi-4",
)  # fmt: skip
_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3_text": Gemma3TextConfig, "phi3": Phi3Config,
}  # fmt: skip
GROUPS = {"short": Groups("short", 100), "long": Groups("long", 400), "brief": Groups("brief", 60, mean=60)}


@dataclass(frozen=True)
class Comparison:
    """Planned and measured bytes of one case; `flops` is the relative difference of FLOPs."""

    model: str
    policy: str
    planned_bytes: float
    measured_bytes: float
    flops: float = 0.0

    @property
    def peak(self) -> float:
        """Relative difference of the planned peak to the measured one."""
        return self.planned_bytes / self.measured_bytes - 1

    @property
    def holds(self) -> bool:
        """Whether the differences are within the goal of docs/planner-accuracy.md."""
        return -0.03 <= self.peak <= 0.10 and abs(self.flops) <= 0.10


@dataclass(frozen=True)
class Case:
    """A case: planned bytes, and how to measure them.

    Attributes:
        measure: Returns bytes, and FLOPs where `planned_flops` are compared; takes seconds to minutes.
    """

    model: str
    policy: str
    planned_bytes: float
    measure: Callable[[], tuple[float, float]]
    planned_flops: float = 0.0

    def compare(self) -> Comparison:
        """Measures the case."""
        size, flops = self.measure()
        off = self.planned_flops / flops - 1 if self.planned_flops else 0.0
        return Comparison(self.model, self.policy, self.planned_bytes, size, off)


class KeepingRunner(Runner):
    """Steps in which the last `kept` layers keep their activations, as `activation_memory` chooses them."""

    kept = 0

    def _prepare(self, name: str) -> Any:
        prepared = super()._prepare(name)
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[len(layers) - self.kept :]:
            layer.gradient_checkpointing = False
        return prepared


def step(shape: ModelShape, groups: Groups, *, kept: int, model: str, policy: str = "", count: int = 1) -> Case:
    """A forward and backward pass over `count` prompts with their responses.

    Args:
        kept: Layers that keep their activations.
    """
    rows, own = [Row(groups.prompt, (groups.mean,) * groups.responses)], adapter_of(shape)

    def measure() -> tuple[float, float]:
        runner = KeepingRunner(
            build(config_of(shape), "meta"), "meta", [groups.groups(count, shape.vocab)], checkpointing=True,
            equal_lengths=True,
        )  # fmt: skip
        runner.kept = kept
        figures = runner.count("ours")
        return figures.peak_bytes, figures.flops

    return Case(
        model, policy, activation_bytes(shape, packed_pass(rows, count, None), PRECISION, own, kept_layers=kept),
        measure, count * ranking_flops(shape, Workload(tuple(rows), count, ""), own, kept_layers=kept),
    )  # fmt: skip


def all_cases(
    models: Sequence[str] = MODELS,
    groups: Sequence[str] = ("short", "long"),
    count: int = 1,
    layers: int | None = None,
) -> Iterator[Case]:
    """The cases of docs/planner-accuracy.md."""
    for model in models:
        shape = KNOWN[model]
        if layers:
            shape = dataclasses.replace(shape, layers=layers)
        for name in groups:
            for words, kept in (("no", 0), ("half of the", shape.layers // 2), ("all", shape.layers)):
                policy = f"{name} prompt, {words} layers kept"
                yield step(shape, GROUPS[name], kept=kept, model=model, policy=policy, count=count)


def measured(cases: Iterable[Case]) -> list[Comparison]:
    """Measures all cases, and prints a line for each."""
    found = []
    print(f"{'case':100}{'planned GB':>12}{'measured GB':>12}{'peak':>9}{'FLOPs':>9}")
    for case in cases:
        found.append(one := case.compare())
        print(
            f"{one.model + ', ' + one.policy:100}{one.planned_bytes / 1e9:12.3f}{one.measured_bytes / 1e9:12.3f}"
            f"{one.peak:+9.1%}{one.flops:+9.1%}" + ("" if one.holds else "  OFF"),
            flush=True,
        )
    print(f"{len(found)} cases: {min(one.peak for one in found):+.1%} to {max(one.peak for one in found):+.1%}")
    return found


def adapter_of(shape: ModelShape) -> Adapter:
    """The adapter that `build` puts on every linear layer."""
    return Adapter(LORA_RANK, shape.adapter(LORA_RANK, "all-linear"), len(shape.linears))


def config_of(shape: ModelShape) -> PretrainedConfig:
    """A transformers configuration of that shape."""
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "use_cache": False,
    }
    if shape.window:
        sizes["sliding_window"] = shape.window
    return _CONFIGS[shape.family](**sizes, attn_implementation="sdpa")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=KNOWN)
    parser.add_argument("--groups", nargs="+", default=["short", "long"], choices=GROUPS)
    parser.add_argument("--count", type=int, default=1, help="Prompts in a forward pass.")
    parser.add_argument("--layers", type=int, help="Cut every model to this many layers.")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = measured(all_cases(options.models, options.groups, options.count, options.layers))
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
