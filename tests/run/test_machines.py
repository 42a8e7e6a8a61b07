"""Several processes sample, score and evaluate like one; two machines, as two launchers on this one, train like one.

The machines have different working folders, so that the second one does not see the folder of the run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from datasets import Dataset, concatenate_datasets
from test_pipeline import files, recipe  # noqa: F401 - files is a fixture
from test_processes import SMOOTH, accelerate_launch, adapter, assert_same_adapters
from test_rank_samples import SAMPLE, made

from tuna_peft import UserError
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.shipped import find_accelerate_config
from tuna_peft.run import rank_samples
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.machines import _digest
from tuna_peft.run.pipeline import run_recipe
from tuna_peft.training.resume import checkpoints

HERE = Path(__file__).parent


def sampled(files, size, below=0):  # noqa: F811
    """A stage on samples that the base ranks as the teacher, with tasks that generate and score."""
    data = {"prompts": {"path": str(files / "ranked.jsonl")}, "sample": SAMPLE,
            "score": {"model": str(files / "base"), "max_tokens_per_batch": 64}}  # fmt: skip
    made_of = made(files, {"data": data}, below=below)
    stages = [stage.model_dump() for stage in made_of.stages]
    for stage in stages:
        stage["train"] |= {**SMOOTH, "per_device_train_batch_size": size, "max_steps": 4}
    tasks = recipe(files).evaluation.tasks.model_dump()
    tasks["graded"]["split"] = "train[:8]"
    evaluation = {"tasks": {name: tasks[name] for name in ("ranking", "graded")}, "batch_size": 2}
    return recipe(files, stages=stages, evaluation=evaluation, export=made_of.export.model_dump())


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("one") / "run"
    run_recipe(sampled(files, 4), folder)
    return folder


def rows_of(run):
    stage = run / "stages" / "contextual"
    names = ("samples.journal.jsonl", "samples.jsonl", "ranking.journal.jsonl", "ranked.jsonl")
    return {name: (stage / name).read_bytes() for name in names}


def measured(run):
    return {
        task: {key: json.loads((run / "evaluation" / "base" / f"{task}.json").read_text())[key]
               for key in ("metrics", "prompts", "groups", "excluded")}
        for task in ("ranking", "graded")
    }  # fmt: skip


def test_two_processes_sample_score_and_evaluate_to_the_bytes_of_one(one, files, tmp_path):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(dump_recipe(sampled(files, 2)))
    result = accelerate_launch("ddp", HERE / "in_processes.py", tmp_path / "recipe.yaml", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path / "run") == rows_of(one)
    assert measured(tmp_path / "run") == measured(one)
    first, second = (json.loads((tmp_path / f"run.{rank}").read_text()) for rank in range(2))
    assert 0 < second["generated"] <= first["generated"] <= 2 * second["generated"]
    assert second["scored"] > 5
    assert_same_adapters(tmp_path / "run", one, ["contextual"])


@pytest.mark.slow
def test_a_run_of_one_process_is_resumed_by_two(files, tmp_path, monkeypatch):  # noqa: F811
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_recipe(sampled(files, 2, below=1), straight)
    real, count = rank_samples.Journal.add, 0

    def add(self, key, value):
        nonlocal count
        count += self.path.name == "samples.journal.jsonl"
        if count == 12:  # in the second of four blocks
            raise RuntimeError("crash")
        real(self, key, value)

    monkeypatch.setattr(rank_samples.Journal, "add", add)
    with pytest.raises(RuntimeError, match="crash"):
        run_recipe(sampled(files, 2, below=1), broken)
    result = accelerate_launch("ddp", HERE / "in_processes.py", broken / "recipe.yaml", broken)
    assert result.returncode == 0, result.stderr
    assert rows_of(broken) == rows_of(straight)
    assert json.loads(Path(f"{broken}.1").read_text())["generated"] == 1  # of three blocks


class Machines:
    """Two launchers with a process each, which run the same command in different folders."""

    def __init__(self, root, command, shared=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folders, self.started = [root / ("shared" if shared else f"machine{rank}") for rank in range(2)], []
        paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
        for rank, folder in enumerate(self.folders):
            folder.mkdir(exist_ok=True)
            text = find_accelerate_config("ddp").read_text()
            for old, new in {
                "num_machines: 1": "num_machines: 2",
                "machine_rank: 0": f"machine_rank: {rank}",
                "main_process_port: 0": f"main_process_ip: 127.0.0.1\nmain_process_port: {port}",
            }.items():
                assert old in text
                text = text.replace(old, new)  # fmt: skip
            (config := root / f"{rank}.yaml").write_text(text)
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
            process = subprocess.Popen(
                [*map(str, [*launcher, *command])], cwd=folder, env=environment, text=True,
                stderr=open(root / f"{rank}.err", "w+"),  # noqa: SIM115
            )  # fmt: skip
            self.started.append(process)
        self.errors = [root / f"{rank}.err" for rank in range(2)]

    def wait(self):
        codes = [process.wait(1800) for process in self.started]
        return codes, [file.read_text() for file in self.errors]


@pytest.mark.slow
def test_two_machines_without_a_shared_folder_are_like_one(one, files, tmp_path):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(dump_recipe(sampled(files, 2)))
    command = [HERE / "in_processes.py", tmp_path / "recipe.yaml", "run"]
    codes, errors = Machines(tmp_path, command).wait()
    assert codes == [0, 0], errors
    first, second = (tmp_path / f"machine{rank}" / "run" for rank in range(2))
    assert rows_of(first) == rows_of(one) and measured(first) == measured(one)
    assert_same_adapters(first, one, ["contextual"])
    # The second machine has what its process reads, and no results of its own.
    assert (second / "stages/contextual/ranked.jsonl").read_bytes() == rows_of(first)["ranked.jsonl"]
    assert not (second / "stack").exists() and not (second / "evaluation").exists()
    with pytest.raises(UserError, match="the copy of a run's folder"):
        run_recipe(sampled(files, 2), second)
    # In a folder that both see there is no copy, and the same adapter.
    (second_root := tmp_path / "again").mkdir()
    codes, errors = Machines(second_root, command, shared=True).wait()
    assert codes == [0, 0], errors
    assert not (second_root / "shared/run/.copy").exists()
    assert adapter(second_root / "shared/run", "contextual").read_bytes() == adapter(first, "contextual").read_bytes()


def many_steps(files):  # noqa: F811
    values = sampled(files, 2).model_dump()
    values["stages"][0]["train"] |= {"max_steps": 20, "save_steps": 2}
    return dump_recipe(recipe(files, **values))


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("uninterrupted")
    (root / "recipe.yaml").write_text(many_steps(files))
    codes, errors = Machines(root, [HERE / "in_processes.py", root / "recipe.yaml", "run"]).wait()
    assert codes == [0, 0], errors
    return adapter(root / "machine0" / "run", "contextual").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_machine_is_killed_the_other_ends_and_the_same_commands_resume(files, uninterrupted, tmp_path, killed):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(many_steps(files))
    command = [HERE / "in_processes.py", tmp_path / "recipe.yaml", "run"]
    machines = Machines(tmp_path, command)
    stage = tmp_path / "machine0" / "run" / "stages" / "contextual"
    while machines.started[0].poll() is None and len(checkpoints(stage)) < 2:
        time.sleep(0.1)
    launcher = psutil.Process(machines.started[killed].pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    codes, errors = machines.wait()
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, -signal.SIGKILL)
    assert "another process of this run has ended, or its machine cannot be reached" in errors[1 - killed]
    codes, errors = Machines(tmp_path, command).wait()
    assert codes == [0, 0], errors
    done = json.loads((stage / "done.json").read_text())
    assert done["steps"] == 20 and done["resumed_from"].startswith("checkpoint-")
    assert adapter(tmp_path / "machine0" / "run", "contextual").read_bytes() == uninterrupted


@pytest.mark.slow
def test_a_machine_with_other_data_or_none_says_so_before_training(files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CONNECT_SECONDS", "120")
    other = sampled(files, 2).model_dump()
    other["stages"][0]["data"]["prompts"]["path"] = "prompts.jsonl"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(files, **other)))
    command = [HERE / "in_processes.py", tmp_path / "recipe.yaml", "run"]
    lines = (files / "ranked.jsonl").read_text().splitlines(keepends=True)
    for folder, count in (("machine0", 32), ("machine1", 31)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.jsonl").write_text("".join(lines[:count]))
    codes, errors = Machines(tmp_path, command).wait()
    assert 0 not in codes and all("have read different prompts for the stage contextual" in error for error in errors)
    (tmp_path / "machine1" / "prompts.jsonl").unlink()
    codes, errors = Machines(tmp_path, command).wait()
    assert 0 not in codes and "there is no file or folder 'prompts.jsonl'" in errors[1]
    assert "not all 2 processes have connected within 0:02:00" in errors[0]
    assert not (tmp_path / "machine0" / "run" / "evaluation").exists()


def test_a_copy_of_a_runs_folder_is_not_resumed(files, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".copy").touch()
    with pytest.raises(UserError, match="the copy of a run's folder"), RunDirectory(tmp_path / "run", recipe(files)):
        pass


def test_the_digest_of_data_depends_on_every_token_and_not_on_how_the_rows_are_stored():
    rows = [{"prompt_ids": [i, 2], "completions_ids": [[i], [3, 4]]} for i in range(1500)]
    whole = Dataset.from_list([{"prompt_ids": [9], "completions_ids": []}, *rows])
    parts = concatenate_datasets([Dataset.from_list(rows[:7]), Dataset.from_list(rows[7:])])
    assert _digest(whole.select(range(1, 1501))) == _digest(parts) == _digest(Dataset.from_list(rows))
    rows[1400]["completions_ids"][1] = [3, 5]
    assert _digest(Dataset.from_list(rows)) != _digest(parts)
