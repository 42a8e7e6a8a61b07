"""A run's folder: what a killed run leaves there is known and cleaned up, and nothing of anybody else's is touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tuna_peft import UserError
from tuna_peft.files import atomic_directory, temporary_directory, write_json
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.folder import RunDirectory, read_run_recipe


def recipe(name="small"):
    stage = {"name": "sft", "type": "sft", "data": {"path": "org/data"}}
    return Recipe.model_validate({"name": name, "base": {"model": "org/base"}, "stages": [stage]})


# Kills itself in the middle of writing: the file is there under its temporary name, and not under its own.
KILLED = """
import os, signal, sys
from pathlib import Path
import tuna_peft.files as files
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.folder import RunDirectory
import yaml
folder, what = Path(sys.argv[1]), sys.argv[2]
recipe = Recipe.model_validate(yaml.safe_load(sys.stdin.read()))
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if what == "recipe.yaml":
    os.fsync = die
with RunDirectory(folder, recipe) as run:
    os.fsync = die
    if what == "run.json":
        run.save(what, {})
    else:
        with files.atomic_directory(folder / what) as aside:
            (aside / "adapter_model.safetensors").write_bytes(bytes(1000))
"""


def kill_while_writing(what, folder):
    command = [sys.executable, "-c", KILLED, str(folder), what]
    done = subprocess.run(command, input=dump_recipe(recipe()), text=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in folder.rglob(".*.tmp")], "nothing was left behind"


@pytest.mark.parametrize("what", ["recipe.yaml", "run.json", "stack/sft", "combined"])
def test_a_run_killed_while_it_writes_neither_locks_its_folder_nor_leaves_anything(tmp_path, what):
    kill_while_writing(what, tmp_path / "run")
    with RunDirectory(tmp_path / "run", recipe()) as run:
        assert not list(run.path.rglob(".*.tmp"))
        assert read_run_recipe(run.path) == recipe()
    with RunDirectory(tmp_path / "run", recipe("corrected")) as run:  # no result yet: the recipe may be corrected
        assert read_run_recipe(run.path) == recipe("corrected")


@pytest.mark.parametrize("left", [[], [".lock"], [".ipynb_checkpoints/x"], [".lock", "evaluation/", "stages/sft/"]])
def test_a_folder_without_any_file_of_others_is_empty(tmp_path, left):
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else (tmp_path / name).touch()
    with RunDirectory(tmp_path, recipe()):
        assert read_run_recipe(tmp_path) == recipe()


@pytest.mark.parametrize("own", ["recipe.yaml", "run.json", ".notes.tmp", "thesis.tex"])
def test_files_of_others_are_neither_used_nor_touched(tmp_path, own):
    (tmp_path / own).write_text("mine")
    for _ in range(2):  # the first refusal must not make the folder ours
        with pytest.raises(UserError, match="holds other files"), RunDirectory(tmp_path, recipe()):
            pass
    assert (tmp_path / own).read_text() == "mine"


def test_results_without_their_recipe_are_not_continued(tmp_path):
    with RunDirectory(tmp_path, recipe()) as run:
        run.save("stages/sft/done.json", {})
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="holds other files"), RunDirectory(tmp_path, recipe("another")):
        pass


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with RunDirectory(tmp_path / "run", recipe()) as run:
        run.save("stages/sft/done.json", {})
    with temporary_directory(tmp_path / "run" / "combined") as aside:
        (aside / "file").touch()
        with RunDirectory(tmp_path / "run", recipe()):
            assert (aside / "file").exists()
    assert not aside.exists()


def test_an_export_removes_what_an_earlier_one_left(tmp_path):
    (tmp_path / ".combined.killed.tmp").mkdir()
    (tmp_path / ".other.tmp").mkdir()
    with atomic_directory(tmp_path / "combined") as aside:
        (aside / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp", "combined"]


def test_a_folder_that_is_deleted_or_replaced_during_the_run_is_an_error(tmp_path):
    folder = tmp_path / "run"
    for replaced in (False, True):
        with pytest.raises(UserError, match="deleted during the run") as error, RunDirectory(folder, recipe()) as run:
            shutil.rmtree(folder)
            if replaced:
                folder.mkdir()
                (folder / ".lock").touch()
            for write in (lambda: run.save("run.json", {}), lambda: run.stage_folder("sft")):
                with pytest.raises(UserError, match="deleted during the run"):
                    write()
            assert not (folder / "run.json").exists()
        assert error.value.where == str(folder)
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(UserError, match="deleted during the run"), RunDirectory(folder, recipe()):
        shutil.rmtree(folder)
        raise RuntimeError("the parent directory does not exist")  # how libraries report it
    with pytest.raises(KeyboardInterrupt), RunDirectory(folder, recipe()):
        shutil.rmtree(folder)
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\0"])
def test_a_damaged_result_is_named_with_the_remedy(tmp_path, text):
    with RunDirectory(tmp_path, recipe()) as run:
        run.save("exports.json", {})
        (tmp_path / "exports.json").write_text(text)
        with pytest.raises(UserError, match="damaged") as error:
            run.load("exports.json")
    assert error.value.where == str(tmp_path / "exports.json") and "Delete it" in error.value.fix


def test_a_recipe_cut_anywhere_is_a_clear_error(tmp_path):
    with RunDirectory(tmp_path, recipe()) as run:
        run.save("stages/sft/done.json", {})
    whole, refused = (tmp_path / "recipe.yaml").read_bytes(), 0
    for end in range(0, len(whole), 7):
        (tmp_path / "recipe.yaml").write_bytes(whole[:end])
        try:
            with RunDirectory(tmp_path, recipe()) as run:
                assert read_run_recipe(tmp_path) == run.recipe  # only defaults were lost
        except UserError as error:
            assert "another --output" in error.fix
            refused += 1
    assert refused > 10
    for content in (b"\xff\xfe", b"[" * 5000):
        (tmp_path / "recipe.yaml").write_bytes(content)
        with pytest.raises(UserError, match="cannot read the recipe"), RunDirectory(tmp_path, recipe()):
            pass


def test_files_and_their_names_are_flushed_to_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    """Without a flush, a power failure may leave an empty file under the final name."""
    events, real = [], {"fsync": os.fsync, "replace": os.replace}

    def fsync(file):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
        real["fsync"](file)

    def replace(source, target):
        events.append(("rename", os.path.basename(target)))
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_json(tmp_path / "done.json", {})
    flushed, renamed, named = events
    assert flushed[0] == "fsync" and flushed[1].startswith(".done.json.")
    assert renamed == ("rename", "done.json") and named == ("fsync", tmp_path.name)

    events.clear()
    with atomic_directory(tmp_path / "adapter") as aside:
        (aside / "weights").write_bytes(b"1")
        (aside / "inside").mkdir()
        (aside / "inside" / "config").write_bytes(b"1")
    at = events.index(("rename", "adapter"))
    assert {("fsync", name) for name in ("weights", "inside", "config", aside.name)} <= set(events[:at])
    assert events[at + 1 :] == [("fsync", tmp_path.name)]
