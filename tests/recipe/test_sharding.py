"""What an accelerate configuration asks of sharding: what a run does, and what it refuses by name."""

import os

import pytest
from test_pipeline import files, recipe  # noqa: F401 - files is a fixture
from typer.testing import CliRunner

from tuna_peft import UserError
from tuna_peft.cli.app import app
from tuna_peft.recipe.pipeline import run_recipe
from tuna_peft.recipe.sharding import Sharding, asked_for_sharding, require_shardable

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def launched(monkeypatch):
    def with_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return with_variables


def test_nothing_is_sharded_unless_asked_for(launched):
    assert asked_for_sharding() is None
    launched(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false")
    assert asked_for_sharding() is None


def test_settings_of_fsdp2_are_followed(launched):
    launched(**FSDP2)
    assert asked_for_sharding() == Sharding(layers=None, reshard_after_forward=True, in_turn=False)
    # The trainers of accelerate see plain data parallelism from here on.
    assert "ACCELERATE_USE_FSDP" not in os.environ
    launched(
        **FSDP2, FSDP_RESHARD_AFTER_FORWARD="false", FSDP_CPU_RAM_EFFICIENT_LOADING="true",
        FSDP_TRANSFORMER_CLS_TO_WRAP="ALayer, BLayer",
    )  # fmt: skip
    assert asked_for_sharding() == Sharding(["ALayer", "BLayer"], reshard_after_forward=False, in_turn=True)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_a_run_does_not_do_is_refused_by_name(files, tmp_path, launched, variables, named):  # noqa: F811
    launched(**variables)
    with pytest.raises(UserError, match=named):
        run_recipe(recipe(files), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_configuration_for_deepspeed_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "zero.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\n")
    result = CliRunner().invoke(app, ["run", "quickstart", "--launch", str(tmp_path / "zero.yaml")])
    assert result.exit_code == 2 and "does not work under DeepSpeed" in result.stderr and "fsdp2" in result.stderr


def test_an_int8_base_is_refused(files):  # noqa: F811
    require_shardable(recipe(files, quantization={"method": "nf4"}))
    with pytest.raises(UserError, match="int8 base cannot be sharded"):
        require_shardable(recipe(files, quantization={"method": "int8"}))
