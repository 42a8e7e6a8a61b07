"""Sends the report of a finished run to the trackers that its stages report to: the samples, and the curves.

The stages themselves are logged by `Trainer`. The report becomes a run of its own at the tracker, `<name>-report`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from tuna_peft.errors import first_line
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.run.folder import RunDirectory

logger = logging.getLogger("tuna_peft")

TRACKED = "tracked.json"


@dataclass(frozen=True)
class Tracked:
    """What a tracker is given.

    Attributes:
        name: Name of the run at the tracker.
        project: `project` of the stages, which Trackio uses.
        folder: The run's folder.
        columns: `prompt`, and the stages.
        samples: The prompts with the response of each stage, as rows.
        figures: By stage, the picture of its curves.
    """

    name: str
    project: str
    folder: Path
    columns: list[str]
    samples: list[list[str]]
    figures: dict[str, Path]


def track_report(run: RunDirectory, report: dict[str, Any]) -> None:
    """Sends the report once; `tracked.json` records that it is done. A tracker that fails is only a warning."""
    stages = resolve_stages(run.recipe)
    names = _trackers([stage.train_overrides.get("report_to") for stage in stages])
    if not names or run.load(TRACKED) is not None:
        return
    columns = list(report["evaluation"])
    figures = {stage.name: run.path / "stages" / stage.name / "curves.png" for stage in stages}
    tracked = Tracked(
        f"{run.recipe.name}-report",
        next((str(name) for stage in stages if (name := stage.train_overrides.get("project"))), "huggingface"),
        run.path,
        ["prompt", *columns],
        [[sample["prompt"], *(sample["responses"].get(stage, {}).get("text", "") for stage in columns)]
         for sample in report["samples"]],
        {stage: file for stage, file in figures.items() if file.is_file()},
    )  # fmt: skip
    for name in names:
        try:
            _SEND[name](tracked)
        except Exception as error:  # whatever a tracker's client or the network raises: the run is complete
            logger.warning("%s did not take the report: %s", name, first_line(error))
    run.save(TRACKED, names)


@contextlib.contextmanager
def own_wandb_run() -> Iterator[None]:
    """Ends the W&B run that a trainer begins inside: the next stage would add to it, from step 0 again."""
    before = getattr(sys.modules.get("wandb"), "run", None)
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and wandb.run is not before:
        wandb.finish()


def _trackers(settings: Sequence[Any]) -> list[str]:
    """The trackers among `report_to` of all stages that can be sent a report."""
    found: list[str] = []
    for setting in settings:
        named = [setting] if isinstance(setting, str) else setting or []
        found += get_available_reporting_integrations() if "all" in named else named
    return [name for name in _SEND if name in found]


def _tensorboard(tracked: Tracked) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    logs = os.environ.get("TENSORBOARD_LOGGING_DIR")
    with SummaryWriter(str(Path(logs).expanduser() / "report" if logs else tracked.folder / "tensorboard")) as writer:
        lines = [tracked.columns, ["---"] * len(tracked.columns), *tracked.samples]
        cells = [["<br>".join(cell.replace("|", "\\|").splitlines()) for cell in line] for line in lines]
        writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in cells))
        for stage, file in tracked.figures.items():
            writer.add_image(f"curves/{stage}", imread(file)[:, :, :3], dataformats="HWC")


def _wandb(tracked: Tracked) -> None:
    import wandb

    with wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), name=tracked.name) as run:
        run.log({"samples": wandb.Table(columns=tracked.columns, data=tracked.samples)})
        run.log({f"curves/{stage}": wandb.Image(str(file)) for stage, file in tracked.figures.items()})


def _trackio(tracked: Tracked) -> None:
    import pandas
    import trackio

    trackio.init(project=tracked.project, name=tracked.name, resume="allow")
    try:
        trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(tracked.samples, columns=tracked.columns))})
        trackio.log({f"curves/{stage}": trackio.Image(str(file)) for stage, file in tracked.figures.items()})
    finally:
        trackio.finish()


def _mlflow(tracked: Tracked) -> None:
    import mlflow

    if experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=tracked.name):
        columns = zip(*tracked.samples, strict=True) if tracked.samples else [[]] * len(tracked.columns)
        mlflow.log_table(dict(zip(tracked.columns, map(list, columns), strict=True)), "samples.json")
        for stage, file in tracked.figures.items():
            mlflow.log_artifact(str(file), f"curves/{stage}")


_SEND: dict[str, Callable[[Tracked], None]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow,
}  # fmt: skip
