"""Sharding requested by an accelerate configuration: which settings a run follows and which it rejects."""

import json
import os

import pytest
import torch
from test_pipeline import files, recipe  # noqa: F401 - files is a fixture
from typer.testing import CliRunner

from tuna_peft import UserError
from tuna_peft.cli.app import app
from tuna_peft.run import sharding
from tuna_peft.run.pipeline import run_recipe
from tuna_peft.run.sharding import (
    Sharding,
    requested_deepspeed,
    requested_sharding,
    require_shardable,
    under_deepspeed,
)

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}


@pytest.fixture
def launched(monkeypatch):
    def with_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return with_variables


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: True)


def test_nothing_is_sharded_without_a_request(launched):
    assert requested_sharding() is None
    launched(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false")
    assert requested_sharding() is None


def test_settings_of_fsdp2_are_followed(launched):
    launched(**FSDP2)
    assert requested_sharding() == Sharding(layers=None, reshard_after_forward=True, in_turn=False)
    # The trainers of accelerate see plain data parallelism from here on.
    assert "ACCELERATE_USE_FSDP" not in os.environ
    launched(
        **FSDP2, FSDP_RESHARD_AFTER_FORWARD="false", FSDP_CPU_RAM_EFFICIENT_LOADING="true",
        FSDP_TRANSFORMER_CLS_TO_WRAP="ALayer, BLayer",
    )  # fmt: skip
    assert requested_sharding() == Sharding(["ALayer", "BLayer"], reshard_after_forward=False, in_turn=True)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage: 3"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_unsupported_settings_are_rejected_by_name(files, tmp_path, launched, installed, variables, named):  # noqa: F811
    launched(**variables)
    with pytest.raises(UserError, match=named):
        run_recipe(recipe(files), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_the_recipe_are_rejected_in_a_deepspeed_configuration(tmp_path, launched, installed):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}))
    launched(**ZERO, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    with pytest.raises(UserError, match="`optimizer` in DeepSpeed's configuration"):
        requested_deepspeed(on_cpu=True)
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert requested_deepspeed(on_cpu=False)


def test_a_single_process_runs_without_deepspeed(launched):
    launched(**{**ZERO, "WORLD_SIZE": "1"})
    assert not requested_deepspeed(on_cpu=True)
    assert not under_deepspeed()  # the trainers read the same variable


def test_accelerate_runs_deepspeed_without_a_gpu(launched, installed, monkeypatch):
    launched(**ZERO, ACCELERATE_USE_CPU="true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert requested_deepspeed(on_cpu=True)
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="DeepSpeed on the CPU of a machine with GPUs"):
        requested_deepspeed(on_cpu=True)


@pytest.mark.parametrize(("stage", "named"), [(3, "fsdp2"), (2, "pip install deepspeed")])
def test_an_unsupported_deepspeed_setup_is_rejected_before_anything_starts(tmp_path, monkeypatch, stage, named):
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: False)
    (tmp_path / "z.yaml").write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{zero_stage: {stage}}}\n")
    result = CliRunner().invoke(app, ["run", "quickstart", "--launch", str(tmp_path / "z.yaml")])
    assert result.exit_code == 2 and named in result.stderr


def test_an_int8_base_is_rejected(files):  # noqa: F811
    require_shardable(recipe(files, quantization={"method": "nf4"}))
    with pytest.raises(UserError, match="int8 base cannot be sharded"):
        require_shardable(recipe(files, quantization={"method": "int8"}))
