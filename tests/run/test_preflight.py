"""The memory check before a run: exact lengths, and when it is silent, warns or stops the run."""

from __future__ import annotations

import logging

import pytest
from transformers import GPT2Config

from tuna_peft.data.collate import RankedCollator
from tuna_peft.errors import UserError
from tuna_peft.limits import GIB
from tuna_peft.planning.from_recipe import plan_recipe, require_native_bf16
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.lengths import encoded_workload, source_workload
from tuna_peft.planning.spec import Device
from tuna_peft.planning.workload import Row
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run import preflight as preflight_module
from tuna_peft.run.inputs import Inputs, read_inputs
from tuna_peft.run.preflight import preflight


@pytest.fixture(scope="module")
def pico():
    """The quickstart with its data, tokenizer and configuration."""
    from tuna_peft.models.base.load import load_config_and_tokenizer

    limits = [f"stages.{name}.limit=40" for name in ("sft.data", "probabilistic.data", "contextual.data.prompts")]
    recipe = load_recipe("quickstart", [*limits, "evaluation.tasks.ranking.limit=10"], check=False)
    config, tokenizer = load_config_and_tokenizer(recipe.base.model)
    return recipe, config, tokenizer, read_inputs(recipe, tokenizer, config)


def on(monkeypatch, device):
    monkeypatch.setattr(preflight_module, "this_device", lambda setting: device)


def test_lengths_of_encoded_rows_are_exact(pico):
    _, _, _, inputs = pico
    rows = inputs.stages["probabilistic"]
    workload = encoded_workload(rows)
    assert workload.rows[3] == Row(len(rows[3]["prompt_ids"]), tuple(map(len, rows[3]["completions_ids"])))
    sft = inputs.stages["sft"]
    assert encoded_workload(sft).rows[5].tokens == len(sft[5]["input_ids"])
    pack = RankedCollator(0, share_responses=False).pack
    assert workload.tokens == sum(len(pack(row).tokens) for row in rows) / len(rows)


def test_a_plan_counts_the_same_lengths_as_the_run(pico):
    recipe, _, tokenizer, inputs = pico
    stage = recipe.stages[1]
    options = {"kind": "ranking", "max_length": 256, "overflow": "error"}
    assert source_workload(stage.data, recipe, tokenizer, **options) == encoded_workload(inputs.stages[stage.name])
    by_characters = source_workload(stage.data, recipe, None, **options)
    assert by_characters.total == 40 and "characters" in by_characters.source


def test_a_run_that_fits_has_no_warning(pico, caplog):
    recipe, config, _, inputs = pico
    with caplog.at_level(logging.INFO):
        plan = preflight(recipe, inputs, config)
    assert plan.fits and plan.device.name == "CPU"
    assert "planned peak" in caplog.text and not any(record.levelno > logging.INFO for record in caplog.records)


def test_a_run_that_may_not_fit_gets_a_warning_with_the_remedy(pico, monkeypatch, caplog):
    recipe, config, _, inputs = pico
    on(monkeypatch, Device("small card", 0.55 * GIB))
    preflight(recipe, inputs, config)
    assert "small card has 0.55 GiB free. To make it fit: " in caplog.text
    assert "stages.contextual.train." in caplog.text


def test_a_run_that_cannot_fit_is_rejected(pico, monkeypatch):
    recipe, config, _, inputs = pico
    on(monkeypatch, Device("tiny card", 5e6))
    with pytest.raises(UserError, match="this cannot fit: .* needs .* GiB at least, and tiny card has 0.00 GiB free"):
        preflight(recipe, inputs, config)


def test_a_model_that_the_planner_does_not_know_runs_without_a_plan(pico, caplog):
    recipe = pico[0]
    config = GPT2Config()
    with caplog.at_level(logging.INFO):
        assert preflight(recipe, Inputs(), config) is None
    assert "no memory plan: the planner does not know models of type 'gpt2'" in caplog.text


@pytest.mark.parametrize(
    "override",
    ["base.dtype=bfloat16", "quantization.compute_dtype=bfloat16", "stages.probabilistic.train.bf16=true"],
)
def test_bf16_on_a_t4_is_refused_by_plan_and_run(pico, monkeypatch, override):
    recipe, t4 = load_recipe("quickstart", [override], check=False), Device.of(find_gpu("T4"))
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"the T4 has no bf16, and `{key}` asks for it"):
        plan_recipe(recipe, [t4])
    on(monkeypatch, t4)
    with pytest.raises(UserError, match="the T4 has no bf16"):
        preflight(recipe, Inputs(), pico[1])
    require_native_bf16(recipe, "RTX 4090", has_bf16=True)


def test_data_that_is_not_here_gets_typical_lengths():
    recipe = load_recipe("two-stage", check=False)
    [plan], source = plan_recipe(recipe, [Device.of(find_gpu("T4"))])
    assert "table of known models" in source
    assert {stage.workload.source[:23] for stage in plan.run.stages} == {"assumed: 10,000 prompts"}
    assert plan.fits
