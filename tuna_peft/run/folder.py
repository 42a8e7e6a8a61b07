"""The folder of a run: its lock, its recipe, its log, and the results that are finished.

`tuna_peft.run.pipeline` works inside a `RunDirectory`: `save` writes the result of a step and `load` finds it when an
interrupted run is resumed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tuna_peft.data.texts import reads_the_clock, set_template_date, template_date
from tuna_peft.errors import UserError
from tuna_peft.evaluation.results import RUN_INFO
from tuna_peft.files import remove_abandoned, take_lock, write_json, write_text
from tuna_peft.recipe.document import read_document
from tuna_peft.recipe.dump import diff_recipes, dump_recipe, sizes_begun_with, with_values
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.machines import FolderCopies, refuse_copy
from tuna_peft.run.metrics_file import METRICS
from tuna_peft.run.processes import Processes
from tuna_peft.terminal import CleanFormatter, log_handler

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger("tuna_peft")

TEMPLATE_DATE, DTYPE, SIZES = "template_date.json", "dtype.json", "sizes.json"
# Files that a run writes before its first result.
_FIRST = ("run.log", METRICS, RUN_INFO, TEMPLATE_DATE, DTYPE, SIZES)
# Folders that hold what a run has computed.
_RESULTS = ("evaluation", "stages", "stack")
# Loggers whose messages go to run.log. Only those of tuna_peft go to the terminal too.
_LOGGED = ("tuna_peft", "transformers", "py.warnings")


def read_run_recipe(folder: Path) -> Recipe | None:
    """The recipe that a run has written into its folder; None if `folder` is not a run's.

    Raises:
        UserError: The file is damaged, or another version of this package has written it, with keys that this version
            does not have.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        return None
    try:
        # The version before left out null, which was the default.
        return Recipe.model_validate({"evaluation": None, **read_document(file).data})
    except (ValidationError, UserError) as error:
        if isinstance(error, UserError):
            reason = error.what
        else:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(
            f"this version of tuna_peft cannot read the recipe of this run ({reason})",
            where=str(file),
            fix="Use the version that made the run (see `packages` in run.json), choose another --output, or delete "
            "this folder to begin anew.",
        ) from error


def as_in_folder(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe`, but with the defaults of the version that began the run in `folder`, so that the same file still means
    the same run: earlier ones measured nothing by default, and had numbers where sizes are `auto` now."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        return recipe
    begun = read_document(file).data
    if "evaluation" not in recipe.model_fields_set and "evaluation" not in begun:
        recipe = recipe.model_copy(update={"evaluation": None})
    return with_values(recipe, sizes) if (sizes := sizes_begun_with(begun, recipe)) else recipe


class RunDirectory:
    """A run's folder, locked for one run at a time; use it as a context manager.

    Only the first process of a run writes. The others wait until it has locked the folder. Machines that do not see
    the folder get copies of the results that they need, see `tuna_peft.run.machines`.

    - `recipe.yaml`: the recipe with `extends` and overrides applied; `run.log`: the log; `metrics.jsonl`: what the
      trainers logged;
    - `run.json`: what the report says about the run besides its results; `template_date.json`: the date in the chat
      template, if it shows one; `dtype.json`: what `base.dtype: auto` means in this run; `sizes.json`:
      the sizes that are `auto` in the recipe;
    - `stages/<name>/`: checkpoints, log history, curves, and `done.json` once the stage is finished. If the run ranks
      the responses itself also `samples.jsonl`, `ranked.jsonl`, their journals, and `feedback.json` once they are
      complete;
    - `evaluation/<stage>/<task>.json`: results of the base and of each stage; `evaluation/journal.jsonl`: the model's
      responses;
    - `stack/`: the adapters; `combined/`, `merged/`, `gguf/`: the exports, with `exports.json` once all are written;
      `pushed.json` once they are published, `tracked.json` once trackers have the report;
    - `report.html`, `report.json`, `report.md`: the report.

    Raises:
        UserError: The folder has a run of another recipe, is in use by another process, has other files, or is deleted
            while the run writes to it.
    """

    def __init__(self, path: str | Path, recipe: Recipe, processes: Processes | None = None):
        self.path = Path(path)
        self.recipe = recipe
        self.processes = processes or Processes(on_cpu=True)
        self._lock: int | None = None
        self._handlers: list[tuple[str, logging.Handler]] = []

    def __enter__(self) -> RunDirectory:
        if self.processes.main:
            self._take()
        self._copies = FolderCopies(self.path, self.processes, self._lock)
        recipe, self.recipe = self.recipe, as_in_folder(self.recipe, self.path)
        if self.recipe.evaluation != recipe.evaluation and self.recipe.evaluation is None and self.processes.main:
            logger.info("an earlier version began this run, without an evaluation: it is resumed without one")
        return self

    def _take(self) -> None:
        if self.path.is_file():
            raise UserError("this is a file, not a folder", where=str(self.path), fix="Choose another --output.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # held until __exit__
        except OSError as error:
            raise UserError(
                f"cannot write here: {error.strerror}",
                where=str(self.path),
                fix="Choose another --output, or change its permissions.",
            ) from error
        try:
            refuse_copy(self.path)
            self._take_lock(self._lock)
            self._take_recipe()
        except BaseException:
            os.close(self._lock)
            raise
        file = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        file.setFormatter(CleanFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        self._handlers = [(name, file) for name in _LOGGED]
        self._handlers.append(("tuna_peft", log_handler()))
        for name, handler in self._handlers:
            logging.getLogger(name).addHandler(handler)
        logger.setLevel(logging.DEBUG)  # the handler of the terminal begins at INFO
        logging.captureWarnings(True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._lock is None:
            return
        logging.captureWarnings(False)
        for name, handler in self._handlers:
            logging.getLogger(name).removeHandler(handler)
            handler.close()
        try:
            # The loss of the folder is what the user should hear of, not what it has caused.
            if error is None or (isinstance(error, Exception) and not isinstance(error, UserError)):
                self._require_folder()
        finally:
            os.close(self._lock)

    def _take_lock(self, file: int) -> None:
        holder = os.pread(file, 20, 0).decode().strip()  # written below by the run that has the lock
        busy, fix = "the output directory is in use by another run", "Wait for it to end, or choose another --output."
        take_lock(file, busy, where=self.path, fix=fix, holder=holder)
        known = {".lock", ".ipynb_checkpoints"}
        if holder:  # a run was here before; without one, a `recipe.yaml` is not ours to replace
            remove_abandoned(self.path)
            known |= {"recipe.yaml", *_FIRST}
        begun = self._begun()
        if not begun:
            known |= {*_RESULTS}  # empty folders
        foreign = [entry.name for entry in self.path.iterdir() if entry.name not in known]
        if foreign and not (begun and (self.path / "recipe.yaml").exists()):
            raise UserError(
                f"the output directory holds other files ({', '.join(sorted(foreign)[:3])} ...)",
                where=str(self.path),
                fix="Choose an empty or new --output.",
            )
        os.pwrite(file, b"%-20d" % os.getpid(), 0)

    def _take_recipe(self) -> None:
        if not self._begun():  # a run that stopped at its inputs has no results yet, so its recipe may be corrected
            for name in _FIRST:
                (self.path / name).unlink(missing_ok=True)
            write_text(self.path / "recipe.yaml", dump_recipe(self.recipe))
            return
        old = read_run_recipe(self.path)
        if old and (differing := diff_recipes(old, as_in_folder(self.recipe, self.path))):
            raise UserError(
                "the output directory belongs to a run of another recipe; these keys differ:\n    "
                + "\n    ".join(differing),
                where=str(self.path),
                fix="Choose another --output, or undo the change to resume the old run.",
            )

    def _begun(self) -> bool:
        """Whether the folder has any result of evaluation or training."""
        return any(path.is_file() for part in _RESULTS for path in (self.path / part).rglob("*"))

    def _require_folder(self) -> None:
        """Raises UserError if the folder was deleted, or replaced by another one, since the run began."""
        if self._lock is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), os.stat(self.path / ".lock")):
                    return
            raise UserError(
                "the output directory was deleted during the run",
                where=str(self.path),
                fix="Delete what was written there since, and run the command again: it begins anew.",
            )

    @contextlib.contextmanager
    def main_first(self, model: Any = None) -> Iterator[None]:
        """See `Processes.main_first`. What the first process has saved in the block, the others find in the folder."""
        with self.processes.main_first(model):
            if not self.processes.main:
                self._copies.update()
            yield
        if self.processes.main:
            self._copies.update()

    def stage_folder(self, name: str) -> Path:
        """The folder of a stage, `stages/<name>`; created if needed."""
        self._require_folder()
        folder = self.path / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, name: str) -> Any | None:
        """The content of the JSON file `name` in the run's folder; None if it is not written yet.

        Raises:
            UserError: The file is damaged.
        """
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        except ValueError as error:
            fix = "Delete it and run the command again: this step is repeated."
            raise UserError(f"this file is damaged: {error}", where=str(file), fix=fix) from error

    def fix_template_date(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Fixes the date that a chat template shows: that of the recipe, or the day on which the run started."""
        if not reads_the_clock(tokenizer):
            return
        date = self.recipe.prompt.date or self.load(TEMPLATE_DATE) or str(template_date(tokenizer))
        self.save(TEMPLATE_DATE, date)
        set_template_date(tokenizer, date)
        prompt = self.recipe.prompt.model_copy(update={"date": date})
        self.recipe = self.recipe.model_copy(update={"prompt": prompt})
        logger.info("the chat template shows a date: %s in all of this run", date)

    def fix_dtype(self, config: PretrainedConfig) -> None:
        """Fixes what `base.dtype: auto` means: the dtype of the machine that began the run, wherever it is resumed."""
        from tuna_peft.models.base.cpu_bf16 import cpu_bf16
        from tuna_peft.models.base.load import hidden_size, resolve_device, resolve_dtype

        if self.recipe.base.dtype != "auto":
            return
        device, hidden = resolve_device(self.recipe.base.device), hidden_size(config)
        here = str(resolve_dtype("auto", device, hidden)).removeprefix("torch.")
        # The version before did not write the file; on a CPU it computed in fp32.
        begun = "float32" if self._begun() and device.type == "cpu" else here
        dtype = self.load(DTYPE) or begun
        self.save(DTYPE, dtype)
        self.recipe = self.recipe.model_copy(update={"base": self.recipe.base.model_copy(update={"dtype": dtype})})
        reason = f" ({cpu_bf16(hidden).reason})" if device.type == "cpu" else ""
        if dtype == here:
            logger.info("computing in %s%s", dtype, reason)
        else:
            logger.warning(
                "this run began in %s and stays in it; a new run would compute in %s here%s", dtype, here, reason
            )

    def fix_sizes(self, sizes: dict[str, int] | None = None) -> None:
        """Replaces `auto` by numbers: those that the run began with, wherever it is resumed; without any, `sizes`.

        Args:
            sizes: Numbers by their keys in the recipe; None while the plan is not made.
        """
        saved: dict[str, int] = self.load(SIZES) or sizes or {}
        if saved:
            self.save(SIZES, saved)
            self.recipe = with_values(self.recipe, saved)
        if sizes:
            logger.info("sizes for this device: %s", ", ".join(f"{key}={value:,}" for key, value in saved.items()))

    def save(self, name: str, value: Any) -> None:
        """Writes `value` to the JSON file `name` in the run's folder, atomically; only the first process does."""
        if self.processes.main:
            self._require_folder()
            write_json(self.path / name, value)
