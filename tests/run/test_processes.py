"""Runs in two processes over gloo train like one process with the same effective batch, and resume."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from rounding import rounding
from safetensors.torch import load_file
from test_pipeline import STAGES, TRAIN, adapter_bytes, files, recipe  # noqa: F401 - files is a fixture
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.models.base.load import resolve_device
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.shipped import find_accelerate_config
from tuna_peft.run.pipeline import run_recipe
from tuna_peft.training.resume import checkpoints

HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(
    not is_deepspeed_available(), reason="needs DeepSpeed: `make test-deepspeed` installs it"
)
TRAINED = ["sft", "probabilistic"]
# Adam divides gradients by their size, and so enlarges the rounding of those that are nearly zero: by at most this.
SMOOTH = {"adam_epsilon": 1e-2}
# Gradients of the tiny model, forward and back, clipped to a norm of 1.
BOUND = rounding(3 * 1088, 1.0)


def in_two(*command):
    """Runs `python -m COMMAND` on the CPU, for commands that start two processes."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def accelerate_launch(config, *command):
    return in_two("accelerate.commands.launch", "--config_file", find_accelerate_config(config), *command)


@pytest.fixture(scope="module")
def ranked(files):  # noqa: F811
    """Examples of different lengths, so that the processes need different numbers of forward passes per step."""
    rows = [json.loads(line) for line in (files / "ranked.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["prompt"] *= 3
    file = files / "lengths.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def of_batch(files, ranked, size, stages=TRAINED):  # noqa: F811
    chosen = [stage.model_dump() for stage in recipe(files).stages if stage.name in stages]
    for stage in chosen:
        stage["train"] = {**TRAIN, **SMOOTH, "per_device_train_batch_size": size}
        if stage["type"] == "ranking":
            stage["data"] = {"path": ranked}
            stage["train"] |= {"max_tokens_per_batch": 40, "gradient_checkpointing": True}
    return recipe(files, stages=chosen)


@pytest.fixture(scope="module")
def two(files, ranked, tmp_path_factory):  # noqa: F811
    """The recipe and a run of it in two data-parallel processes, started by accelerate."""
    root = tmp_path_factory.mktemp("two")
    (root / "recipe.yaml").write_text(dump_recipe(of_batch(files, ranked, 2)))
    result = accelerate_launch("ddp", "-m", "tuna_peft", "run", root / "recipe.yaml", "--output", root / "run")
    assert result.returncode == 0, result.stderr
    return root


def adapter(run, stage):
    return run / "stack" / stage / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def one(files, ranked, tmp_path_factory):  # noqa: F811
    """A run in one process with the same effective batch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run_recipe(of_batch(files, ranked, 4), folder)
    return folder


def assert_trained_alike(run, one):
    for stage in TRAINED:
        losses = []
        for folder in (run, one):
            history = json.loads((folder / "stages" / stage / "log_history.json").read_text())
            losses.append([entry["loss"] for entry in history if "loss" in entry])
        assert len(losses[1]) == 4
        assert losses[0] == pytest.approx(losses[1], rel=0, abs=4 * BOUND * max(losses[1]))
    assert_same_adapters(run, one, TRAINED)
    figures, expected = (json.loads((folder / "report.json").read_text())["stages"] for folder in (run, one))
    for stage in TRAINED:
        assert figures[stage]["tokens"] == expected[stage]["tokens"]


def assert_same_adapters(run, one, stages):
    """After four steps."""
    for stage in stages:
        ours, theirs = load_file(adapter(run, stage)), load_file(adapter(one, stage))
        for key in theirs:
            # Each of the four steps adds the error of its gradient, times the learning rate over Adam's epsilon.
            bound = 4 * TRAIN["learning_rate"] * BOUND / SMOOTH["adam_epsilon"]
            torch.testing.assert_close(ours[key], theirs[key], atol=bound, rtol=0)


def test_two_processes_train_as_one_with_the_same_prompts_a_step(two, one):
    assert_trained_alike(two / "run", one)
    log = (two / "run" / "run.log").read_text()
    assert log.count("stage probabilistic: ranking on 32 rows") == 1  # one process writes
    assert list(json.loads((two / "run" / "report.json").read_text())["stages"]) == TRAINED


def test_a_sharded_base_trains_to_the_same_bytes(two, tmp_path):
    command = ["tuna_peft", "run", two / "recipe.yaml", "--output", tmp_path / "run", "--launch", "fsdp2"]
    result = in_two(*command)
    assert result.returncode == 0, result.stderr
    assert "sharded over 2 processes" in (tmp_path / "run" / "run.log").read_text()
    for stage in TRAINED:
        assert adapter(tmp_path / "run", stage).read_bytes() == adapter(two / "run", stage).read_bytes()
    ours, theirs = (json.loads((run / "report.json").read_text()) for run in (tmp_path / "run", two / "run"))
    assert ours["exports"].keys() == theirs["exports"].keys()
    for stage, tasks in theirs["evaluation"].items():
        for task, result in tasks.items():
            assert ours["evaluation"][stage][task]["metrics"] == result["metrics"]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_trains_as_one_process(two, one, tmp_path, stage):
    config = tmp_path / "zero.yaml"
    config.write_text(find_accelerate_config("zero2").read_text().replace("zero_stage: 2", f"zero_stage: {stage}"))
    result = in_two("tuna_peft", "run", two / "recipe.yaml", "--output", tmp_path / "run", "--launch", config)
    assert result.returncode == 0, result.stderr
    assert_trained_alike(tmp_path / "run", one)
    states = list((tmp_path / "run" / "stages").glob("*/checkpoint-4/global_step4/*_optim_states.pt"))
    assert len(states) == 4  # each process its own, for each stage


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_resume_to_the_same_bytes(files, ranked, tmp_path, config):  # noqa: F811
    (tmp_path / "two.yaml").write_text(dump_recipe(of_batch(files, ranked, 2, STAGES)))
    command = [config, HERE / "in_processes.py", tmp_path / "two.yaml"]
    assert accelerate_launch(*command, tmp_path / "straight").returncode == 0
    assert accelerate_launch(*command, tmp_path / "broken", 7).returncode != 0
    state = tmp_path / "broken" / "stages" / "probabilistic" / "checkpoint-2" / "trainer_state.json"
    values = json.loads(state.read_text())
    for sums in (each := values["stateful_callbacks"]["tuna_peft"]):
        sums["seconds"] += 1000
    assert len(each) == 2
    state.write_text(json.dumps(values))
    result = accelerate_launch(*command, tmp_path / "broken")
    assert result.returncode == 0, result.stderr
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")
    broken, straight = (json.loads((tmp_path / run / "report.json").read_text()) for run in ("broken", "straight"))
    for stage in STAGES:
        figures, expected = broken["stages"][stage], straight["stages"][stage]
        for figure in ("steps", "epochs", "tokens", "train_loss"):
            assert figures[figure] == expected[figure], (stage, figure)
        assert (figures["seconds"] > 1000) == (stage == "probabilistic")
    assert broken["curves"] == straight["curves"]


@pytest.mark.slow
def test_sigterm_under_a_launcher_saves_the_step(files, ranked, tmp_path):  # noqa: F811
    long = of_batch(files, ranked, 2, ["sft"]).model_dump()
    long["stages"][0]["train"] |= {"max_steps": 2000, "save_steps": 7}
    (tmp_path / "two.yaml").write_text(dump_recipe(recipe(files, stages=long["stages"])))
    command = [sys.executable, "-m", "tuna_peft", "run", tmp_path / "two.yaml", "--output", tmp_path / "run"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([*map(str, command), "--launch", "ddp"], env=environment)
    stage = tmp_path / "run" / "stages" / "sft"
    while run.poll() is None and not checkpoints(stage):
        time.sleep(0.1)
    run.terminate()
    assert run.wait() == 130
    history = json.loads((stage / "log_history.json").read_text())
    assert history[-1]["step"] < 2000
    assert checkpoints(stage)[0].name == f"checkpoint-{history[-1]['step']}"


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device() == resolve_device("cuda") == torch.device("cuda:3")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_device() == torch.device("cpu")


def test_launch_starts_accelerate_with_the_same_command(monkeypatch, tmp_path):
    started = []

    class Process:
        def __init__(self, command, env):
            started.append(command)

        def wait(self):
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    output = str(tmp_path / "run")
    result = CliRunner().invoke(app, ["run", "quickstart", "seed=1", "--output", output, "--launch", "ddp"])
    assert result.exit_code == 3
    [command] = started
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"] and command[4].endswith("ddp.yaml")
    assert command[5:] == ["-m", "tuna_peft", "run", "quickstart", "seed=1", "--output", output, "--yes"]


def test_an_accelerate_configuration_that_does_not_exist_is_named():
    result = CliRunner().invoke(app, ["run", "quickstart", "--launch", "dpp.yaml"])
    assert result.exit_code == 2
    assert "there is no such accelerate configuration" in result.stderr and "ddp" in result.stderr
