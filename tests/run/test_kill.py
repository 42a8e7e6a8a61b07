"""A run that is killed with `kill -9` at random moments, several times, ends with the same bytes."""

import random
import signal
import subprocess
import sys
import time

import pytest
from test_pipeline import TRAIN, adapter_bytes, files, recipe  # noqa: F401 - files is a fixture

from tuna_peft.recipe.dump import dump_recipe

LIMIT = 240.0


def start(file, output):
    command = [sys.executable, "-m", "tuna_peft", "run", str(file), "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_kill_9_at_random_moments(files, tmp_path):  # noqa: F811
    stages = [stage.model_dump() for stage in recipe(files).stages]
    for stage in stages:
        stage["train"] = {**TRAIN, "max_steps": 12}
    file = tmp_path / "recipe.yaml"
    evaluation = {"tasks": {"ranking": {"path": str(files / "ranked.jsonl")}}}
    file.write_text(dump_recipe(recipe(files, stages=stages, evaluation=evaluation)))

    began = time.monotonic()
    straight = start(file, tmp_path / "straight")
    output, _ = straight.communicate(timeout=LIMIT)
    assert straight.returncode == 0, output.decode()
    seconds = time.monotonic() - began

    draw, kills = random.Random(0), 0
    while True:
        run = start(file, tmp_path / "killed")
        try:
            # Importing takes some seconds; after that, any moment.
            output, _ = run.communicate(timeout=draw.uniform(0.4, 1.0) * seconds if kills < 6 else LIMIT)
            break
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            kills += 1
    assert run.returncode == 0, output.decode()
    assert kills > 0
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "straight")
    for name in ("combined/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
