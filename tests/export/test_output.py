"""What happens to the output directory when something goes wrong, and what an export may not overwrite."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_llama import Tiny

from tuna_peft.errors import UserError
from tuna_peft.export import merge as merge_module
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.output import RECORD, peak_rss_bytes

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
    assert error.value.where == str(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("before", [False, True], ids=["new", "over-an-earlier-one"])
def test_an_interrupted_merge_leaves_nothing_new(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, before: bool
) -> None:
    out = tmp_path / "merged"
    if before:
        merge_stack(tiny.stack, out)
    write, calls = merge_module.write_safetensors, []

    def fails_in_the_second_shard(path: Path, *args: Any) -> None:
        calls.append(path)
        write(path, *args)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(merge_module, "write_safetensors", fails_in_the_second_shard)
    expected = (UserError, "the disk is full") if isinstance(failure, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(expected[0], match=expected[1]):
        merge_stack(tiny.stack, out, max_shard_size="50KB")
    assert [path.name for path in tmp_path.iterdir()] == (["merged"] if before else [])
    if before:
        assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
        assert load_file(out / "model.safetensors")


def test_an_interrupted_replacement_puts_the_earlier_export_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "combined"
    combine_stack(tiny.stack, out, upto="sft")
    before = (out / RECORD).read_text()
    replace = os.replace

    def fails_onto_out(source: Any, target: Any) -> None:
        if Path(target) == out and not str(source).endswith(".before"):
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
    assert peak is None or 50e6 < peak < 100e9
