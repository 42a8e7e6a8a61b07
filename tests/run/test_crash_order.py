"""A run that fails before and after each of its durable writes, in turn, and is resumed each time, ends the same."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path

import pytest
from kill_sweep import outcome
from test_pipeline import TRAIN, files, recipe  # noqa: F401 - files is a fixture
from transformers import Trainer

from tuna_peft import files as writing
from tuna_peft.export import output
from tuna_peft.journal import Journal
from tuna_peft.run import pipeline


class Crash(BaseException):
    """What no code of a run catches."""


class Crashes:
    """Lets a run fail once before and once after each durable write, and lists these writes.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._wrap(monkeypatch, writing, "write_bytes", lambda path, data: Path(path))
        for owner in (writing, output):
            self._wrap(monkeypatch, owner, "replace_directory", lambda aside, final: final)
        self._wrap(monkeypatch, Journal, "add", lambda journal, key, value: journal.path)
        self._wrap(
            monkeypatch, Trainer, "_save_checkpoint",
            lambda trainer, *_: Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}",
        )  # fmt: skip

    def _wrap(self, monkeypatch, owner, name, target):
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(*args):
            path = target(*args)
            # An export is written under a temporary name, which differs each time.
            parts = [part.split(".")[1] if part.endswith(".tmp") else part for part in path.parts]
            place = "/".join(parts[len(self.folder.parts) :]) if path.is_relative_to(self.folder) else str(path)
            self._reach(f"before {place}")
            real(*args)
            self._reach(f"after {place}")

        monkeypatch.setattr(owner, name, wrapped)

    def _reach(self, point: str) -> None:
        if point not in self.done:
            self.done.append(point)
            raise Crash(point)


def test_a_failure_before_and_after_every_durable_write_changes_nothing(files, tmp_path, monkeypatch):  # noqa: F811
    ranked = {"path": str(files / "ranked.jsonl")}
    train = {**TRAIN, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant", "logging_steps": 2}
    evaluation = {"tasks": {"graded": {**ranked, "split": "train[:2]", "grader": "test_pipeline:grade",
                                       "max_new_tokens": 2}}}  # fmt: skip
    small = recipe(
        files, stages=[{"name": "only", "type": "ranking", "data": {**ranked, "limit": 8}, "train": train}],
        quantization={"method": "none"}, evaluation=evaluation, export={"divergence_prompts": 1},
    )  # fmt: skip
    # What is only read, and is the same each time, is read once.
    base = pipeline._load_base(small, pipeline.Processes(on_cpu=True))
    monkeypatch.setattr(pipeline, "_load_base", lambda *_: copy.deepcopy(base))
    inputs = pipeline.read_inputs(small, base.tokenizer, base.model.config)
    monkeypatch.setattr(pipeline, "_check_and_read", lambda *_: inputs)

    pipeline.run_recipe(small, tmp_path / "straight")
    crashes = Crashes(tmp_path / "run")
    with monkeypatch.context() as patch:
        crashes.watch(patch)
        for crash in itertools.count(1):
            try:
                pipeline.run_recipe(small, crashes.folder)
                break
            except Crash:
                assert len(crashes.done) == crash < 200
    expected = ["recipe.yaml", "run.json", "evaluation/journal.jsonl", "evaluation/base/graded.json",
                "stages/only/checkpoint-1", "stages/only/checkpoint-2", "stages/only/log_history.json", "stack/only",
                "stack/stack.json", "stages/only/done.json", "evaluation/only/graded.json", "combined", "merged",
                "divergence_prompts.json", "exports.json", "report.json", "report.html", "report.md"]  # fmt: skip
    assert [point for point in crashes.done if point.partition(" ")[2] in expected] == [
        f"{when} {name}" for name in expected for when in ("before", "after")
    ]
    assert outcome(crashes.folder) == outcome(tmp_path / "straight")
