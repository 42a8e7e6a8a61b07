"""Measures models with the tasks of an evaluation: the stages of a run, or any other model.

`evaluate_stage` is called by a run (`tuna_peft.run.pipeline`) before the first stage and after each. `evaluate_target`
is what `tuna-peft evaluate` calls: it loads a finished run, a stack or a single model, and evaluates its stages.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuna_peft.data.config import PromptConfig
from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.evaluation.results import RUN_INFO, TaskResult, load_result, save_result
from tuna_peft.evaluation.session import JOURNAL, Session
from tuna_peft.files import write_json
from tuna_peft.journal import Journal
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.models.stack.any_model import load_any_model, local_stack, model_digest, usual_prompt
from tuna_peft.models.stack.files import quantization_method
from tuna_peft.planning.command_sizes import batch_size
from tuna_peft.recipe.evaluation_schema import EvaluationSettings
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.run.folder import read_run_recipe
from tuna_peft.run.inputs import RANKED, encode_self_ranked, read_inputs
from tuna_peft.run.measure import environment
from tuna_peft.run.tasks import Task, TaskData, read_tasks

logger = logging.getLogger("tuna_peft")


def evaluate_stage(session: Session, tasks: Sequence[Task]) -> dict[str, TaskResult]:
    """Runs each task whose result the session's folder does not have yet, and saves its result there.

    Returns:
        The results by task, new and old.

    Raises:
        UserError: The folder has a result of the same name that was measured on other data or with other settings.
    """
    results = {}
    for task in tasks:
        result = load_result(session.folder, session.stage, task.name)
        if result is not None and result.settings != task.settings:
            keys = {*task.settings, *result.settings}
            differing = sorted(key for key in keys if task.settings.get(key) != result.settings.get(key))
            raise UserError(
                f"{session.stage} has a result for {task.name} already, with other settings ({', '.join(differing)})",
                where=str(session.folder),
                fix="Choose another --output, or delete the old result.",
            )
        if result is None:
            started = time.monotonic()
            result = task.run(session)
            result.settings, result.seconds = task.settings, round(time.monotonic() - started, 2)
            save_result(session.folder, session.stage, result)
            logger.info("%s: %s", session.stage, _describe(result))
        results[task.name] = result
    return results


def _describe(result: TaskResult) -> str:
    """One line for the log: the main metric, and how many prompts were skipped."""
    metric = result.metrics[result.main]
    value = "no value" if metric.value is None else str(metric)
    skipped = "".join(f"; skipped: {one.count} ({one.reason})" for one in result.excluded)
    return f"{result.task} {result.main} {value} over {metric.count:,}{skipped}"


@dataclass(frozen=True)
class Loading:
    """How the model is loaded, see `tuna_peft.models.stack.any_model.load_any_model`."""

    base_model: str | None = None
    quantization: str = "none"
    device: str = "auto"
    trust_remote_code: bool = False


def evaluate_target(
    target: str,
    settings: EvaluationSettings,
    output: Path,
    *,
    stages: Sequence[str] | None = None,
    prompt: PromptConfig | None = None,
    loading: Loading = Loading(),
) -> dict[str, dict[str, TaskResult]]:
    """Evaluates a stack, `base` and every stage, switching adapters on one loaded base; or evaluates a single model.

    Args:
        target: A run's folder, a stack, a merged model, a Hub id or `builtin:pico-llama`.
        settings: What to measure. Without tasks, a run with `evaluation: auto` is measured on the prompts that it held
            back.
        output: The folder for `evaluation/<stage>/<task>.json` and for `run.json`, which a report needs. Results that
            are there already are not measured again.
        stages: The stages to evaluate, `base` among them; None evaluates all. A single model is the stage `model`.
        prompt: The prompt template; None is the one of training.
        loading: How to load the model.

    Returns:
        Results by stage and task.

    Raises:
        UserError: No such model, stage, data or Python function, or `output` holds the results of another model.
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
    template = prompt or PromptConfig.model_validate(loaded.prompt or usual_prompt(loaded.tokenizer))
    recipe = read_run_recipe(Path(target))
    if recipe and recipe.evaluation == "auto" and not settings.tasks.given():
        inputs = read_inputs(recipe, loaded.tokenizer, loaded.model.config)
        for one in resolve_stages(recipe):
            if one.feedback and (ranked := Path(target) / "stages" / one.name / RANKED).is_file():
                encode_self_ranked(inputs, one, ranked, recipe.prompt, loaded.tokenizer, loaded.model.config)
        data = TaskData(inputs.tasks)
    else:
        data = read_tasks(settings.tasks, template, loaded.tokenizer, loaded.model.config, known)
    digest = model_digest(loaded.model)
    _save_facts(output, target, digest, known, data.counts)
    results: dict[str, dict[str, TaskResult]] = {}
    with Journal(output / JOURNAL) as journal:
        for stage in _evaluation_order(known, settings):
            if stages is not None and stage not in stages:
                continue
            adapters = loaded.names[: known.index(stage)]
            stage_digest = {**digest, "adapters": {name: digest["adapters"][name] for name in adapters}}
            with active_adapters(loaded.model, adapters):
                size = batch_size(settings.batch_size, loaded.model)
                session = Session(output, stage, stage_digest, loaded.model, loaded.tokenizer, journal, size)
                results[stage] = evaluate_stage(session, data.tasks)
    return {stage: results[stage] for stage in known if stage in results}


def holds_prompts_back(target: str) -> bool:
    """Whether `target` is a run with `evaluation: auto`, which is measured without naming a task."""
    recipe = read_run_recipe(Path(target))
    return recipe is not None and recipe.evaluation == "auto"


def settings_of_run(target: str) -> dict[str, Any]:
    """The section `evaluation` of a run's recipe, as plain values; empty where `target` is anything else."""
    recipe = read_run_recipe(Path(target))
    named = recipe.named_evaluation if recipe else None
    return named.model_dump(exclude_none=True) if named else {}


def default_output(target: str) -> Path:
    """The folder for results: a run's own, or one below `runs` for any other model."""
    if read_run_recipe(Path(target)) is not None:
        return Path(target)
    return Path("runs") / f"evaluation-{re.sub(r'[^A-Za-z0-9._-]+', '-', target.strip('/.'))}"


def _evaluation_order(known: list[str], settings: EvaluationSettings) -> list[str]:
    """The stages, beginning with the one that Vicuna QA compares the others with: its responses must exist first."""
    vicuna = settings.tasks.vicuna
    return sorted(known, key=lambda stage: vicuna is None or stage != vicuna.against)


def _save_facts(
    output: Path, target: str, digest: dict[str, Any], stages: list[str], counts: dict[str, dict[str, Any]]
) -> None:
    """Writes `run.json`, from which the report takes what was evaluated; a training run has written its own.

    Raises:
        UserError: `output` has the results of other weights.
    """
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
    if (output / RUN_INFO).is_file():
        before = json.loads((output / RUN_INFO).read_text(encoding="utf-8"))
        stack = local_stack(target)
        if "evaluated" not in before and stack is not None and stack.resolve() == (output / "stack").resolve():
            return
        if _weights(before) != _weights(facts):
            raise UserError(
                f"the folder is of another model: {before['name']}", where=str(output), fix="Choose another --output."
            )
        facts["data"] = {**before["data"], **facts["data"]}
    write_json(output / RUN_INFO, facts)


def _weights(facts: dict[str, Any]) -> list[Any]:
    """What identifies the evaluated weights."""
    base = facts["base"]
    return [base["fingerprint"] or base["model"], base["quantization"]["method"], facts.get("adapters")]
