"""What happens to the output directory when something goes wrong, and what an export may not overwrite."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_llama import Tiny

from tuna_peft.errors import UserError
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.merged_weights import MergedWeights
from tuna_peft.export.output import RECORD, partial_directory, resumable_directory
from tuna_peft.limits import peak_rss_bytes

EXPORTS = pytest.mark.parametrize("export", [combine_stack, merge_stack])
Export = Callable[..., Any]


@EXPORTS
def test_too_little_space_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Export
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"not enough disk space: [\d.]+ MB needed, 0\.0 MB free") as error:
        export(tiny.stack, tmp_path / "deep" / "out")
    assert error.value.where == str(tmp_path)  # the folder that exists
    assert not list(tmp_path.iterdir())


def _count(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0, failure: BaseException | None = None) -> list[str]:
    """Lists the tensors that merges make from now on, and fails at one of them."""
    make, made = MergedWeights.make, []

    def counted(self: MergedWeights, name: str) -> Any:
        made.append(name)
        if failure is not None and len(made) == stop_at:
            raise failure
        return make(self, name)

    monkeypatch.setattr(MergedWeights, "make", counted)
    return made


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("before", [False, True], ids=["new", "over-an-earlier-one"])
def test_an_interrupted_merge_leaves_nothing_that_looks_complete_and_goes_on(
    tiny: Tiny, tmp_path: Path, failure: BaseException, before: bool
) -> None:
    out = tmp_path / "merged"
    straight = merge_stack(tiny.stack, tmp_path / "straight", max_shard_size="50KB")
    if before:
        merge_stack(tiny.stack, out)
    expected = (UserError, "the disk is full") if isinstance(failure, OSError) else (KeyboardInterrupt, None)
    with pytest.MonkeyPatch.context() as patch:
        _count(patch, 14, failure)
        with pytest.raises(expected[0], match=expected[1]):
            merge_stack(tiny.stack, out, max_shard_size="50KB")
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == (["merged", "straight"] if before else ["straight"])
    if before:
        assert load_file(out / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        made = _count(patch)
        merge_stack(tiny.stack, out, max_shard_size="50KB")
    # The updates of the file that was incomplete are measured again.
    assert straight.tensors - 13 <= len(made) < straight.tensors
    _assert_same_files(out, tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "straight"]


KILLED = """
import os, signal, sys
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.merged_weights import MergedWeights
make, made = MergedWeights.make, []
def killed(self, name):
    made.append(name)
    if len(made) == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(self, name)
MergedWeights.make = killed
merge_stack(sys.argv[1], sys.argv[2], dtype="nf4", max_shard_size="20KB")
"""


def test_kill_9_in_the_middle_of_a_merge(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "merged"
    run = subprocess.run([sys.executable, "-c", KILLED, str(tiny.stack), str(out)], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not out.exists()
    straight = merge_stack(tiny.stack, tmp_path / "straight", dtype="nf4", max_shard_size="20KB")
    made = _count(monkeypatch)
    report = merge_stack(tiny.stack, out, dtype="nf4", max_shard_size="20KB")
    _assert_same_files(out, tmp_path / "straight")
    assert report.kept_update == straight.kept_update is not None
    groups = len(load_file(Path(tiny.base) / "model.safetensors"))
    # What Python had not handed to the system yet is made again, and the last file's updates are measured again.
    assert 0 < len(made) < groups
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "straight"]


def _assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_what_is_left_of_another_merge_is_not_gone_on_with(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _count(patch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_stack(tiny.stack, tmp_path / "out", dtype="float16", max_shard_size="50KB")
    assert (partial_directory(tmp_path / "out") / "plan.json").is_file()
    merge_stack(tiny.stack, tmp_path / "out", dtype="float32", max_shard_size="50KB")
    merge_stack(tiny.stack, tmp_path / "straight", dtype="float32", max_shard_size="50KB")
    _assert_same_files(tmp_path / "out", tmp_path / "straight")


def test_two_merges_do_not_write_the_same_export(tiny: Tiny, tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out", {"by": "another"}) as aside:
        (aside / "something").touch()
        with pytest.raises(UserError, match="another process is writing"):
            merge_stack(tiny.stack, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["something"]


def test_an_interrupted_replacement_puts_the_earlier_export_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "combined"
    combine_stack(tiny.stack, out, upto="sft")
    before = (out / RECORD).read_text()
    replace = os.replace

    def fails_onto_out(source: Any, target: Any) -> None:
        if Path(target) == out and ".before" not in str(source):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_onto_out)
    with pytest.raises(KeyboardInterrupt):
        combine_stack(tiny.stack, out)
    assert (out / RECORD).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["combined"]


@EXPORTS
def test_an_earlier_export_is_replaced_and_nothing_else_is(tiny: Tiny, tmp_path: Path, export: Export) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(tiny.stack, out)
    export(tiny.stack, out, upto="sft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("text")
    with pytest.raises(UserError, match="was not written by an export"):
        export(tiny.stack, precious)
    with pytest.raises(UserError, match="was not written by an export"):
        export(tiny.stack, precious / "thesis.tex")
    assert (precious / "thesis.tex").read_text() == "text"


@EXPORTS
def test_the_inputs_are_never_the_output(tiny: Tiny, export: Export) -> None:
    for out in (tiny.stack, tiny.stack.parent):
        with pytest.raises(UserError, match="would delete"):
            export(tiny.stack, out)
    if export is merge_stack:
        with pytest.raises(UserError, match="would delete"):
            export(tiny.stack, tiny.base)
    assert (tiny.stack / "stack.json").is_file()


def test_peak_memory_is_that_of_this_process() -> None:
    peak = peak_rss_bytes()
    assert peak is not None and 50e6 < peak < 100e9
