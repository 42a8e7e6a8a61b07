"""Messages and exit codes."""

from __future__ import annotations

import errno
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.cli.group import describe_error, is_disk_full
from tuna_peft.errors import UserError

RECIPE = "name: x\nbase: {model: org/model}\nstages:\n  - {name: a, type: sft, data: {path: org/data}}\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `tuna-peft run` on a sound recipe, with a pipeline that raises what it is given."""

    def invoke(error, *arguments):
        def run_recipe(recipe, output):
            raise error

        pipeline = types.ModuleType("pipeline")
        pipeline.run_recipe = run_recipe
        monkeypatch.setitem(sys.modules, "tuna_peft.run.pipeline", pipeline)
        (tmp_path / "r.yaml").write_text(RECIPE)
        return CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), *arguments])

    return invoke


def test_a_users_mistake_exits_with_2_and_no_traceback(run):
    result = run(UserError("it is wrong", where="file:3", fix="Mend it."))
    assert result.exit_code == 2
    assert result.stderr == "error: file:3: it is wrong\n  Mend it.\n"


def test_a_full_gpu_says_what_saves_memory(run):
    result = run(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a capacity of"))
    assert result.exit_code == 2
    assert "the GPU's memory is full (CUDA out of memory. Tried to allocate 2 GiB.)" in result.stderr
    assert "halve\n  per_device_train_batch_size" in result.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_wherever_it_stands(run, tmp_path, place):
    if place == "after":
        result = run(UserError("it is wrong"), "--debug")
    else:
        run(UserError("it is wrong"))
        result = CliRunner().invoke(app, ["--debug", "run", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: it is wrong" in result.stderr


def test_an_unexpected_error_is_one_line_with_a_hint(run):
    result = run(RuntimeError("first line\nsecond line"))
    assert result.exit_code == 1
    assert result.stderr == "error: RuntimeError: first line\n  Run it with --debug for the traceback.\n"


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(run):
    result = run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert "Run the same command again to resume." in result.stderr


def test_bad_options_exit_with_2():
    assert CliRunner().invoke(app, ["run"]).exit_code == 2
    assert CliRunner().invoke(app, ["run", "x", "--no-such-option"]).exit_code == 2
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2


def test_a_bad_override_and_a_missing_recipe_exit_with_2(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), "stages.b.train.x=1"])
    assert result.exit_code == 2
    assert "the recipe has no stage `b`" in result.stderr
    assert CliRunner().invoke(app, ["run", "no-such-recipe"]).exit_code == 2


def test_a_path_that_cannot_be_used_is_a_users_mistake(run):
    result = run(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000))
    assert result.exit_code == 2
    assert "File name too long\n  Check the path" in result.stderr
    assert run(OSError("no errno")).exit_code == 1


def test_a_full_disk_is_told_apart_also_when_it_is_only_the_cause():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = full
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.ENOENT, "no such file"))
    assert describe_error(wrapped) == ("the disk is full\n  Free some space and run the command again.", 2)
