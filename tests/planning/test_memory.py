"""The arithmetic of memory against hand counts, real modules and measured peaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from benchmarks import planner, planner_phases  # noqa: E402
from benchmarks.shapes import LORA_RANK, build  # noqa: E402
from tuna_peft.planning import memory  # noqa: E402
from tuna_peft.planning.memory import Adapter, Precision, trainer_parts, weight_parts  # noqa: E402
from tuna_peft.planning.shapes import KNOWN, ModelShape  # noqa: E402

SMALL = ModelShape(hidden=512, intermediate=1408, layers=2, heads=8, kv_heads=4, head_dim=64, vocab=1000)
GEMMA = dataclasses.replace(SMALL, family="gemma3_text", masks=2, tied=True)
PHI = dataclasses.replace(SMALL, family="phi3")


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_of_a_4_bit_weight_are_those_of_bitsandbytes(double_quant):
    weight = torch.randn(512, 1408)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double_quant else 0)
    expected = (packed.nbytes + scales) / weight.numel()
    assert Precision("nf4", double_quant, 2).body == pytest.approx(expected, rel=1e-3)
    assert round(Precision("nf4", True, 2).body, 3) == 0.516


def test_parameters_are_those_of_the_model():
    for shape in (
        SMALL,
        dataclasses.replace(SMALL, tied=True),
        dataclasses.replace(SMALL, family="qwen3"),
        GEMMA,
        PHI,
    ):
        model = build(planner.config_of(shape), "meta")
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        every = sum(parameter.numel() for parameter in model.parameters())
        assert shape.adapter(LORA_RANK, "all-linear") == trained
        norms = 2 * shape.head_dim * shape.layers if shape.head_norms else 0
        assert shape.body + shape.unquantized == every - trained - norms


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-2-7b", 6.738), ("llama-3.1-8b", 8.030), ("llama-3.1-70b", 70.554), ("qwen2.5-7b", 7.616)],
)
def test_known_shapes_have_the_published_sizes(model, billions):
    shape = KNOWN[model]
    assert (shape.body + shape.unquantized) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_bytes_of_training_by_hand():
    """Weights and gradients in 32 bits, two states of AdamW in 32 or 8 bits; every adapter also concatenated."""
    own, below = Adapter(16, 1000, 7), [Adapter(8, 300, 7), Adapter(4, 200, 7)]
    for optimizer, states in (("adamw_torch", 8), ("paged_adamw_8bit", 2), ("lion", 4), ("sgd", 0)):
        parts = trainer_parts(own, below, optimizer, Precision("nf4", True, 2))
        assert list(parts.values()) == [1000 * (4 + 4 + 2), 1000 * states, 500 * (4 + 2)]
    assert list(trainer_parts(own, [], "sgd", Precision("none", True, 4)).values()) == [12000, 0]


def test_the_tile_of_supervised_logits_is_that_of_trl():
    assert memory.SUPERVISED_TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_whole_runs_of_the_published_estimate():
    parts = weight_parts(KNOWN["llama-7b"], Precision("nf4", True, 2))
    assert sum(parts.values()) / 1e9 == pytest.approx(3.34 + 0.52, abs=0.02)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ("llama-3.2-1b", 0),
        ("llama-3.2-1b", 4),
        ("llama-7b", 2),
        ("qwen3-8b", 0),
        ("qwen3-8b", 4),
        ("phi-4", 0),
        ("phi-3-mini", 4),
    ],
)
def test_peak_and_flops_are_those_measured_on_meta(model, kept):
    """Cut to four layers: the whole shapes are for the slow test."""
    shape = dataclasses.replace(KNOWN[model], layers=4)
    found = planner.step(shape, planner.GROUPS["short"], kept=kept, model=model).compare()
    assert found.holds, found


@pytest.mark.parametrize("model", ["llama-3.2-1b", "phi-3-mini"])
def test_peaks_of_supervised_steps_scoring_and_generation_are_those_measured_on_meta(model):
    """And of a teacher and a judge in 16 bits, and of a text's logits."""
    shape = dataclasses.replace(KNOWN[model], layers=2)
    for case in planner_phases.cases(shape, name=model, brief=True):
        found = case.compare()
        assert found.holds, found


@pytest.mark.slow
def test_peak_and_flops_of_whole_shapes_under_every_policy():
    assert planner.main([]) == 0
    assert planner_phases.main([]) == 0
