"""The report of a run reaches the trackers that its stages name: TensorBoard and Trackio for real, offline."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from test_pipeline import files, recipe  # noqa: F401 - files is a fixture

from tuna_peft.evaluation.report.curves import save_curves
from tuna_peft.run import trackers
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.trackers import TRACKED, own_wandb_run, track_report

RESPONSES = {"base": "a | b\nc", "sft": "two"}
REPORT = {
    "evaluation": {"base": {}, "sft": {}},
    "samples": [{"prompt": "w3 w4", "responses": {stage: {"text": text} for stage, text in RESPONSES.items()}}],
}


@pytest.fixture
def run(files, tmp_path):  # noqa: F811
    """A run's folder with the curves of one stage; its only stage reports to the trackers in `stages`."""

    def begin(*names, **train):
        stage = {"name": "sft", "type": "sft", "data": {"path": str(files / "sft.json")},
                 "train": {"report_to": list(names), **train}}  # fmt: skip
        directory = RunDirectory(tmp_path / "run", recipe(files, stages=[stage]))
        save_curves(
            [{"step": step, "loss": 1.0 / step} for step in (1, 2)], directory.stage_folder("sft") / "curves.png"
        )
        return directory

    return begin


def test_tensorboard(run, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    directory = run("tensorboard")
    track_report(directory, REPORT)
    events = EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["curves/sft"]
    [text] = events.Tensors("samples/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines == ["| prompt | base | sft |", "| --- | --- | --- |", "| w3 w4 | a \\| b<br>c | two |"]


def test_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    track_report(run("trackio", project="tuna-test"), REPORT)
    logged = SQLiteStorage.get_logs("tuna-test", "tiny-report")
    assert "w3 w4" in str(logged) and "two" in str(logged) and "curves/sft" in str(logged)
    assert list(TRACKIO_DIR.rglob("*.png"))


class Recorder:
    """Stands in for a tracker's client: keeps each call by its dotted name."""

    def __init__(self, calls, name=""):
        self._calls, self._name = calls, name

    def __getattr__(self, name):
        return Recorder(self._calls, f"{self._name}.{name}")

    def __call__(self, *arguments, **options):
        self._calls.append((self._name, arguments, options))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._calls.append((self._name + ".end", (), {}))


@pytest.mark.parametrize(
    ("name", "table", "figure"),
    [("wandb", ".Table", ".Image"), ("mlflow", ".log_table", ".log_artifact")],
)
def test_clients_are_given_table_and_figure(run, monkeypatch, name, table, figure):
    calls = []
    monkeypatch.setitem(sys.modules, name, Recorder(calls))
    track_report(run(name), REPORT)
    by_name = {called: (arguments, options) for called, arguments, options in calls}
    assert "w3 w4" in str(by_name[table]) and "two" in str(by_name[table])
    assert "curves.png" in str(by_name[figure])
    assert any(called.endswith(".end") for called in by_name)


def test_each_tracker_is_given_the_report_once(run, monkeypatch, caplog):
    sent = []
    monkeypatch.setitem(trackers._SEND, "wandb", lambda tracked: sent.append("wandb"))

    def refuse(tracked):
        sent.append("mlflow")
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers._SEND, "mlflow", refuse)
    directory = run("mlflow", "wandb", "comet_ml")
    track_report(directory, REPORT)
    track_report(directory, REPORT)
    assert sent == ["wandb", "mlflow"] and "mlflow did not take the report: no route" in caplog.text
    assert directory.load(TRACKED) == ["wandb", "mlflow"]


def test_without_trackers_nothing_is_written(run):
    directory = run()
    track_report(directory, REPORT)
    assert directory.load(TRACKED) is None


@pytest.mark.parametrize("before", [None, "the user's own"])
def test_the_run_that_a_stage_begins_at_wandb_ends_with_it(monkeypatch, before):
    ended = []
    wandb = SimpleNamespace(run=before, finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with own_wandb_run():
        wandb.run = before or "the stage's"
    assert ended == ([] if before else [True])
