"""Two processes over gloo: the training of one with the same prompts a step, one folder, resumed as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import STAGES, TRAIN, adapter_bytes, files, recipe  # noqa: F401 - files is a fixture
from typer.testing import CliRunner

from tuna_peft import UserError
from tuna_peft.cli.app import app
from tuna_peft.models.base import resolve_device
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.pipeline import run_recipe

HERE = Path(__file__).parent


def in_two(file, output, *after):
    """The exit code of a run in two processes."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(HERE / "in_processes.py"), str(file), str(output), *map(str, after)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def of_batch(files, size, stages=STAGES):  # noqa: F811
    chosen = [stage.model_dump() for stage in recipe(files).stages if stage.name in stages]
    for stage in chosen:
        stage["train"] = {**TRAIN, "per_device_train_batch_size": size}
    return recipe(files, stages=chosen)


def test_two_processes_train_as_one_with_the_same_prompts_a_step(files, tmp_path):  # noqa: F811
    two, one = of_batch(files, 2, ["sft", "probabilistic"]), of_batch(files, 4, ["sft", "probabilistic"])
    (tmp_path / "two.yaml").write_text(dump_recipe(two))
    result = in_two(tmp_path / "two.yaml", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    run_recipe(one, tmp_path / "one")
    logs = {}
    for run in ("one", "two"):
        for stage in ("sft", "probabilistic"):
            history = json.loads((tmp_path / run / "stages" / stage / "log_history.json").read_text())
            logs[run, stage] = [entry["loss"] for entry in history if "loss" in entry]
    for stage in ("sft", "probabilistic"):
        assert len(logs["one", stage]) == 4
        assert logs["two", stage] == pytest.approx(logs["one", stage], rel=1e-5)
        ours, theirs = (
            load_file(tmp_path / run / "stack" / stage / "adapter_model.safetensors") for run in ("two", "one")
        )
        # Adam divides tiny gradients by their own size, so the last digits of a sum show.
        assert all(torch.allclose(ours[key], theirs[key], atol=2e-3) for key in theirs)
    log = (tmp_path / "two" / "run.log").read_text()
    assert log.count("stage probabilistic: ranking on 32 rows") == 1  # one process writes
    assert list(json.loads((tmp_path / "two" / "report.json").read_text())["stages"]) == ["sft", "probabilistic"]


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bytes(files, tmp_path):  # noqa: F811
    (tmp_path / "two.yaml").write_text(dump_recipe(of_batch(files, 2)))
    assert in_two(tmp_path / "two.yaml", tmp_path / "straight").returncode == 0
    assert in_two(tmp_path / "two.yaml", tmp_path / "broken", 7).returncode != 0
    assert (tmp_path / "broken" / "stages" / "probabilistic" / "checkpoint-2").is_dir()
    result = in_two(tmp_path / "two.yaml", tmp_path / "broken")
    assert result.returncode == 0, result.stderr
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device() == torch.device("cuda:3")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_launchers_that_shard_are_refused(files, tmp_path, monkeypatch, variable, name):  # noqa: F811
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"does not work under {name} yet"):
        run_recipe(recipe(files), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_launch_starts_accelerate_with_the_same_command(monkeypatch, tmp_path):
    started = []

    class Process:
        def __init__(self, command):
            started.append(command)

        def wait(self):
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    output = str(tmp_path / "run")
    result = CliRunner().invoke(app, ["run", "quickstart", "seed=1", "--output", output, "--launch", "ddp"])
    assert result.exit_code == 3
    [command] = started
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"] and command[4].endswith("ddp.yaml")
    assert command[5:] == ["-m", "tuna_peft", "run", "quickstart", "seed=1", "--output", output]


def test_an_accelerate_configuration_that_does_not_exist_is_named():
    result = CliRunner().invoke(app, ["run", "quickstart", "--launch", "dpp.yaml"])
    assert result.exit_code == 2
    assert "there is no such accelerate configuration" in result.stderr and "ddp" in result.stderr
