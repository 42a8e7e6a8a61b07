"""`tuna-peft evaluate`: any model, or every stage of a stack on one loaded base."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuna_peft.data.config import PromptConfig
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.evaluation.report.build import FACTS
from tuna_peft.evaluation.results import TaskResult
from tuna_peft.evaluation.session import JOURNAL, Session
from tuna_peft.files import write_json
from tuna_peft.journal import Journal
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.models.stack.any_model import load_any_model, local_stack, model_digest, usual_prompt
from tuna_peft.models.stack.files import quantization_method
from tuna_peft.recipe.evaluation_schema import EvaluationSettings
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.evaluate import evaluate_stage
from tuna_peft.run.measure import environment
from tuna_peft.run.tasks import read_tasks


@dataclass(frozen=True)
class Loading:
    """How the model is loaded, see `tuna_peft.models.stack.any_model.load_any_model`."""

    base_model: str | None = None
    quantization: str = "none"
    device: str = "auto"
    trust_remote_code: bool = False


def recipe_of_run(target: str) -> Recipe | None:
    """The recipe that lies in a run's folder; None for anything else."""
    file = Path(target) / "recipe.yaml"
    return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else None


def default_output(target: str) -> Path:
    """A run keeps its results itself; those of any other model go below `runs`."""
    if recipe_of_run(target) is not None:
        return Path(target)
    return Path("runs") / f"evaluation-{re.sub(r'[^A-Za-z0-9._-]+', '-', target.strip('/.'))}"


def evaluate_target(
    target: str,
    settings: EvaluationSettings,
    output: Path,
    *,
    stages: Sequence[str] | None = None,
    prompt: PromptConfig | None = None,
    loading: Loading = Loading(),
) -> dict[str, dict[str, TaskResult]]:
    """Runs the tasks on `base` and every stage of a stack, switching adapters on one loaded base; or on one model.

    Args:
        target: A run's folder, a stack, a merged model, a Hub id or `builtin:pico-llama`.
        settings: What to measure.
        output: Gets `evaluation/<stage>/<task>.json`, and what a report needs besides; what is there already is not
            measured again.
        stages: Some of the stages, `base` among them; None takes all. A single model is the stage `model`.
        prompt: How instructions become prompts; None is as in training.
        loading: How to load the model.

    Returns:
        Results by stage and task.

    Raises:
        UserError: No such model, stage, data or program, or `output` holds the results of another model.
    """
    is_stack = local_stack(target) is not None
    loaded = load_any_model(
        target, base_model=loading.base_model, quantization=loading.quantization, device=loading.device,
        trust_remote_code=loading.trust_remote_code,
    )  # fmt: skip
    known = ["base", *loaded.names] if is_stack else ["model"]
    for stage in stages or ():
        if stage not in known:
            raise UserError(f"there is no stage {stage!r}", where=target, fix=did_you_mean(stage, known))
    how = prompt or PromptConfig.model_validate(loaded.prompt or usual_prompt(loaded.tokenizer))
    data = read_tasks(settings.tasks, how, loaded.tokenizer, loaded.model.config, known)
    digest = model_digest(loaded.model)
    _keep_facts(output, target, digest, known, data.counts)
    results: dict[str, dict[str, TaskResult]] = {}
    with Journal(output / JOURNAL) as journal:
        for stage in _order(known, settings):
            if stages is not None and stage not in stages:
                continue
            adapters = loaded.names[: known.index(stage)]
            of_stage = {**digest, "adapters": {name: digest["adapters"][name] for name in adapters}}
            with active_adapters(loaded.model, adapters):
                session = Session(
                    output, stage, of_stage, loaded.model, loaded.tokenizer, journal, settings.batch_size
                )
                results[stage] = evaluate_stage(session, data.tasks)
    return {stage: results[stage] for stage in known if stage in results}


def _order(known: list[str], settings: EvaluationSettings) -> list[str]:
    """The stages, first the one whose answers the others' are compared with."""
    vicuna = settings.tasks.vicuna
    return sorted(known, key=lambda stage: vicuna is None or stage != vicuna.against)


def _keep_facts(
    output: Path, target: str, digest: dict[str, Any], stages: list[str], counts: dict[str, dict[str, Any]]
) -> None:
    """Writes what is evaluated in `output`, for the report; a run has done so itself."""
    facts = {
        "name": f"evaluation of {Path(target).resolve().name if Path(target).exists() else target}",
        "seed": None,
        "base": {**digest["base"], "quantization": {"method": quantization_method(digest["quantization"])}},
        "adapters": digest["adapters"],
        "stages": [],
        "evaluated": stages,
        "data": {f"evaluation.{task}": of_task for task, of_task in counts.items()},
        "environment": environment(),
    }
    if (output / FACTS).is_file():
        before = json.loads((output / FACTS).read_text(encoding="utf-8"))
        stack = local_stack(target)
        if "evaluated" not in before and stack is not None and stack.resolve() == (output / "stack").resolve():
            return
        if _weights(before) != _weights(facts):
            raise UserError(
                f"the folder is of another model: {before['name']}", where=str(output), fix="Choose another --output."
            )
        facts["data"] = {**before["data"], **facts["data"]}
    write_json(output / FACTS, facts)


def _weights(facts: dict[str, Any]) -> list[Any]:
    base = facts["base"]
    return [base["fingerprint"] or base["model"], base["quantization"]["method"], facts.get("adapters")]


def settings_of(target: str) -> dict[str, Any]:
    """The `evaluation` of a run's recipe as plain values; empty for anything else."""
    recipe = recipe_of_run(target)
    return recipe.evaluation.model_dump(exclude_none=True) if recipe and recipe.evaluation else {}
