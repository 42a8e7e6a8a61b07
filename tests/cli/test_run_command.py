"""`run`: what reaches the pipeline, and what is printed at the end."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.cli.summary import run_summary
from tuna_peft.terminal import console

RECIPE = "name: x\nbase: {model: org/model}\nstages:\n  - {name: a, type: sft, data: {path: org/data}}\n"
REPORT = {
    "name": "x",
    "seed": 0,
    "base": {"model": "org/model"},
    "evaluation": {
        stage: {
            "ranking": {
                "main": "pair_accuracy",
                "metrics": {"pair_accuracy": {"value": value, "low": None, "high": None}},
            }
        }
        for stage, value in (("base", 0.5), ("a", 0.75))
    },
    "changes": {},
    "exports": {
        "base without adapters": {"divergence": {"kl_mean": 0.08}},
        "combined": {"divergence": {"kl_mean": 0.0}},
        "combined on the unquantized base": {"divergence": {"kl_mean": 0.64}},
        "merged": {"divergence": {"kl_mean": 2e-7}},
    },
    "curves": {"a": {"loss": {"loss": [[1, 2.5], [12, 1.25]]}}},
    "stages": {"a": {"steps": 12, "tokens": 3456, "seconds": 7.0, "peak_memory_gib": 1.25}},
}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A pipeline that only notes its calls; the current directory holds `r.yaml`."""
    noted = []
    pipeline = types.ModuleType("pipeline")
    pipeline.run_recipe = lambda recipe, output: noted.append((recipe, output)) or REPORT
    monkeypatch.setitem(sys.modules, "tuna_peft.run.pipeline", pipeline)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return noted


def test_overrides_and_output_reach_the_pipeline(calls):
    arguments = ["run", "r.yaml", "stages.a.train.learning_rate=1e-5", "--output", "out", "seed=3"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    [(recipe, output)] = calls
    assert recipe.stages[0].train == {"learning_rate": 1e-5}
    assert recipe.seed == 3
    assert output == Path("out")


def test_the_default_folder_has_the_recipes_name(calls):
    CliRunner().invoke(app, ["run", "r.yaml"])
    assert calls[0][1] == Path("runs/x")


def test_the_table_and_the_next_commands_come_last(calls):
    Path("runs/x/merged").mkdir(parents=True)
    lines = CliRunner().invoke(app, ["run", "r.yaml"]).stdout.splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[1:]]
    assert rows[0] == ["after", "base", "a"] and rows[1] == ["ranking accuracy", "0.500", "0.750"]
    assert ["loss, first to last", "-", "2.500 to 1.250"] in rows and ["tokens", "-", "3,456"] in rows
    assert ["peak GiB", "-", "1.25"] in rows
    text = "\n".join(lines)
    assert "response" not in text  # nothing was graded
    for command in ("chat runs/x", "generate runs/x 'Your instruction'", "compare runs/x@base runs/x"):
        assert f"  tuna-peft {command}" in lines
    assert 'AutoModelForCausalLM.from_pretrained("runs/x/merged")' in text
    assert "PeftModel" not in text  # nothing was combined
    assert lines[-1].strip() == "runs/x/report.html"


def test_four_stages_with_their_intervals_fit_into_80_columns():
    stages = ["base", "sft", "probabilistic", "contextual"]
    metric = {"value": 0.71, "low": 0.682, "high": 0.739}
    measured = {"ranking": {"main": "pair_accuracy", "metrics": {"pair_accuracy": metric, "margin": metric}}}
    curves = {stage: {"loss": {"loss": [[1, 2.5], [12, 1.25]]}} for stage in stages[1:]}
    report = {**REPORT, "evaluation": dict.fromkeys(stages, measured), "curves": curves}
    out = io.StringIO()
    console(file=out, width=80).print(run_summary(report, Path("runs/x")), crop=False)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80 and "…" not in out.getvalue()
    assert lines[1].split() == ["after", *stages]
    assert ["0.682 to 0.739"] * 4 in [re.split(r"\s{2,}", line.strip()) for line in lines]


@pytest.mark.parametrize("quantized", [True, False])
def test_the_ways_to_load_give_the_base_of_training_and_come_by_their_distance(calls, quantized):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    stack = {"base": {"model": "org/model"}, "quantization": settings if quantized else None, "load_dtype": "float16"}
    for folder in ("stack", "combined", "merged", "gguf"):
        Path("runs/x", folder).mkdir(parents=True)
    Path("runs/x/stack/stack.json").write_text(json.dumps(stack))
    Path("runs/x/gguf/x-Q8_0.gguf").touch()
    text = " ".join(CliRunner().invoke(app, ["run", "r.yaml"]).stdout.split())
    kinds = ("AutoPeftModelForCausalLM", "AutoModelForCausalLM", "llama-cli -m runs/x/gguf/x-Q8_0.gguf")
    places = [text.index(kind) for kind in kinds]
    assert places == sorted(places)
    assert ("bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='float16')" in text) == quantized
    assert "PEFT (nearest, KL divergence from the trained adapters 0.0e+00 nats)" in text
    assert "2.0e-07 nats" in text and "llama.cpp (not measured)" in text
    assert "another model from the adapter: 6.4e-01 nats away; training changed the base by 8.0e-02" in text


def test_a_dry_run_runs_nothing(calls):
    result = CliRunner().invoke(app, ["run", "r.yaml", "--dry-run"])
    assert result.exit_code == 0
    assert "name: x" in result.stdout
    assert "What `run` would do in runs/x" in result.stdout
    assert calls == []
    assert not Path("runs").exists()
