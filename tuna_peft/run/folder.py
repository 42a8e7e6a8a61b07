"""The folder of a run: its lock, its recipe, its log, and what is finished in it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import IO, Any

import yaml

from tuna_peft.errors import UserError
from tuna_peft.evaluation.report.build import FACTS
from tuna_peft.files import take_lock, write_json, write_text
from tuna_peft.recipe.dump import diff_recipes, dump_recipe
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.processes import Processes

logger = logging.getLogger("tuna_peft")

# What goes into run.log; only our own lines go to the terminal as well.
_LOGGED = ("tuna_peft", "transformers", "py.warnings")


class RunDirectory:
    """One run's folder, held by one run at a time; use it as a context manager.

    Of the processes of a run only the first writes; the others come in once it has taken the folder.

    - `recipe.yaml`: the resolved recipe; `run.log`;
    - `evaluation/<stage>/<task>.json`: results of the base and after each stage; the model's answers in a journal;
    - `stages/<name>/`: checkpoints, log history, curves; `done.json` once the stage is finished; where the run makes
      the ranks also `samples.jsonl`, `ranked.jsonl`, their journals, and `feedback.json` once they are made;
    - `stack/`, `combined/`, `merged/`: the adapters, as one adapter, as one model;
    - `run.json`: what the run is, for its report; `report.html`, `report.json`, `report.md`.

    Raises:
        UserError: The folder belongs to another recipe, is in use by another process, or is no run's folder.
    """

    def __init__(self, path: str | Path, recipe: Recipe, processes: Processes | None = None):
        self.path = Path(path)
        self.recipe = recipe
        self.processes = processes or Processes(on_cpu=True)
        self._lock: IO[str] | None = None
        self._handlers: list[tuple[str, logging.Handler]] = []

    def __enter__(self) -> RunDirectory:
        if self.processes.main:
            self._take()
        self.processes.wait()
        return self

    def _take(self) -> None:
        if self.path.is_file():
            raise UserError("this is a file, not a folder", where=str(self.path), fix="Choose another --output.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until __exit__
        except OSError as error:
            raise UserError(
                f"cannot write here: {error.strerror}",
                where=str(self.path),
                fix="Choose another --output, or change its permissions.",
            ) from error
        self._take_lock()
        try:
            self._check_recipe()
        except BaseException:
            self._lock.close()
            raise
        file = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        self._handlers = [(name, file) for name in _LOGGED]
        self._handlers.append(("tuna_peft", logging.StreamHandler()))
        for name, handler in self._handlers:
            logging.getLogger(name).addHandler(handler)
        logger.setLevel(logging.INFO)
        logging.captureWarnings(True)

    def __exit__(self, *exc: object) -> None:
        if self._lock is None:
            return
        logging.captureWarnings(False)
        for name, handler in self._handlers:
            logging.getLogger(name).removeHandler(handler)
            handler.close()
        self._lock.close()

    def _take_lock(self) -> None:
        assert self._lock is not None
        self._lock.seek(0)
        try:
            take_lock(
                self._lock.fileno(),
                "the output directory is in use by another run",
                where=self.path,
                fix="Wait for it to end, or choose another --output.",
                holder=self._lock.read(20).strip(),  # written below by the run that has the lock
            )
        except UserError:
            self._lock.close()
            raise
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _check_recipe(self) -> None:
        file = self.path / "recipe.yaml"
        if file.exists() and not self._begun():
            file.unlink()  # the recipe of a run that stopped at its inputs may be corrected
            for name in ("run.log", FACTS):
                (self.path / name).unlink(missing_ok=True)
        if not file.exists():
            if foreign := [entry.name for entry in self.path.iterdir() if entry.name not in (".lock", "stages")]:
                raise UserError(
                    f"the output directory holds other files ({', '.join(sorted(foreign)[:3])} ...)",
                    where=str(self.path),
                    fix="Choose an empty or new --output.",
                )
            write_text(file, dump_recipe(self.recipe))
            return
        old = Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        if differing := diff_recipes(old, self.recipe):
            raise UserError(
                "the output directory belongs to a run of another recipe; these keys differ:\n    "
                + "\n    ".join(differing),
                where=str(self.path),
                fix="Choose another --output, or undo the change to go on with the old run.",
            )

    def _begun(self) -> bool:
        """Whether anything has been evaluated or trained here."""
        parts = ("evaluation", "stages", "stack")
        return any(path.is_file() for part in parts for path in (self.path / part).rglob("*"))

    def stage_folder(self, name: str) -> Path:
        """The working folder of a stage."""
        folder = self.path / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, name: str) -> Any | None:
        """The JSON file `name` below the run's folder, None where it is not written yet."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def save(self, name: str, value: Any) -> None:
        """Writes `value` as the JSON file `name` below the run's folder, all at once, in the first process."""
        if self.processes.main:
            write_json(self.path / name, value)
