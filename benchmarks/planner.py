"""Compares the planner with what is measured on meta tensors: `python -m benchmarks.planner`.

Peak bytes of a ranking step beyond weights, adapters, gradients and optimiser (`measure.Runner`), and counted FLOPs,
at the full shapes of real models without a weight. Exit code 1 when a peak is off by more than 10 %, or under by more
than 3 %, or FLOPs by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
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
    """One case: predicted over measured, minus one."""

    case: str
    peak: float
    flops: float
    measured_bytes: float

    @property
    def holds(self) -> bool:
        """Whether it keeps what docs/planning.md promises."""
        return -0.03 <= self.peak <= 0.10 and abs(self.flops) <= 0.10


class KeepingRunner(Runner):
    """Steps in which the last `kept` layers keep their activations, as `activation_memory` chooses them."""

    kept = 0

    def _prepare(self, name: str) -> Any:
        prepared = super()._prepare(name)
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[len(layers) - self.kept :]:
            layer.gradient_checkpointing = False
        return prepared


def compare(shape: ModelShape, groups: Groups, *, kept: int, name: str, count: int = 1) -> Comparison:
    """Measures one micro-batch of `count` groups on meta and predicts it.

    Args:
        kept: Layers that keep their activations.
    """
    config = config_of(shape)
    runner = KeepingRunner(
        build(config, "meta"), "meta", [groups.groups(count, shape.vocab)], checkpointing=True, equal_lengths=True
    )
    runner.kept = kept
    figures = runner.count("ours")
    rows = [Row(groups.prompt, (groups.mean,) * groups.responses)]
    batch = packed_pass(rows, count, None)
    own = adapter_of(shape)
    peak = activation_bytes(shape, batch, PRECISION, own, unchecked=kept)
    flops = count * ranking_flops(shape, Workload(tuple(rows), count, ""), own, unchecked=kept)
    return Comparison(name, peak / figures.peak_bytes - 1, flops / figures.flops - 1, figures.peak_bytes)


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
    return _CONFIGS[shape.family](**sizes, attn_implementation="sdpa")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=KNOWN)
    parser.add_argument("--groups", nargs="+", default=["short", "long"], choices=GROUPS)
    parser.add_argument("--count", type=int, default=1, help="Groups to a micro-batch.")
    parser.add_argument("--layers", type=int, help="Cut every model to this many layers.")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = []
    print(f"{'case':44}{'measured GB':>12}{'peak':>9}{'FLOPs':>9}")
    for model in options.models:
        shape = KNOWN[model]
        if options.layers:
            shape = dataclasses.replace(shape, layers=options.layers)
        for name in options.groups:
            for kept in (0, shape.layers // 2, shape.layers):
                case = f"{model}, {name}, {kept} of {shape.layers} layers kept"
                result = compare(shape, GROUPS[name], kept=kept, name=case, count=options.count)
                found.append(result)
                print(
                    f"{case:44}{result.measured_bytes / 1e9:12.3f}{result.peak:+9.1%}{result.flops:+9.1%}"
                    + ("" if result.holds else "  OFF"),
                    flush=True,
                )
    worst = max(abs(result.peak) for result in found), min(result.peak for result in found)
    print(f"{len(found)} cases: worst {worst[0]:.1%}, most under {-worst[1]:.1%}")
    return 0 if all(result.holds for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
