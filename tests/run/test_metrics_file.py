"""`metrics.jsonl`: after kills, lost and repeated lines it holds what the log history holds, once."""

from __future__ import annotations

import json
import math

from transformers import TrainerState

from tuna_peft.run.metrics_file import MetricsFile, finite


def logged(file, *steps):
    """What a trainer does with the losses of `steps`: each is appended to the history, then logged."""
    state = TrainerState()
    for step in steps:
        state.log_history.append({"loss": step / 8, "step": step})
        file.on_log(None, state, None)
    return state


def lines(path):
    return [(line["stage"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def test_a_resumed_stage_repeats_no_line_and_loses_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, "sft")
    first.on_train_begin(None, TrainerState(), None)
    assert not path.exists()
    first.on_train_end(None, logged(first, 1, 2), None)
    assert lines(path) == [("sft", 1), ("sft", 2)]

    second = MetricsFile(path, "ranking")
    logged(second, 1, 2, 3)
    with open(path, "a") as file:
        file.write('{"stage": "ranking", "st')  # killed here, and the last checkpoint is of step 2
    resumed = TrainerState(log_history=[{"loss": 0.125, "step": 1}, {"loss": 0.25, "step": 2}])
    second.on_train_begin(None, resumed, None)
    assert lines(path) == [("sft", 1), ("sft", 2), ("ranking", 1), ("ranking", 2)]

    path.write_text("")  # the power failed before anything reached the disk
    second.on_train_end(None, resumed, None)
    assert lines(path) == [("ranking", 1), ("ranking", 2)]


def test_another_process_writes_nothing(tmp_path):
    file, state = MetricsFile(tmp_path / "metrics.jsonl", "sft"), TrainerState(is_world_process_zero=False)
    state.log_history.append({"loss": 1.0, "step": 1})
    for event in (file.on_train_begin, file.on_log, file.on_train_end):
        event(None, state, None)
    assert not file.path.exists()


def test_numbers_that_json_does_not_have_become_null():
    """fp16 overflows in the first steps, and the trainer logs their gradient norm."""
    entry = {"loss": 1.5, "grad_norm": math.inf, "eval": math.nan, "step": 1, "name": "x"}
    assert finite(entry) == {"loss": 1.5, "grad_norm": None, "eval": None, "step": 1, "name": "x"}
    json.dumps(finite(entry), allow_nan=False)
