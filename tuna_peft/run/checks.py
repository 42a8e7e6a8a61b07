"""What a run checks before any weight is loaded: from the recipe, the base's configuration and tokenizer.

`tuna_peft.run.pipeline`, `tuna_peft.run.dry_run` and `tuna-peft plan` call the same functions, so that a recipe that
passes `--dry-run` is not refused by the run for the same reasons. The data is read elsewhere (`tuna_peft.run.inputs`).
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.models.base.load import load_config_and_tokenizer
from tuna_peft.models.stack.trial import check_stack
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.recipe.schema import BaseSettings, Recipe
from tuna_peft.run.exports import require_exports
from tuna_peft.run.train_stage import lora_config, stage_config
from tuna_peft.training.stage_options import require_possible


def check_options(recipe: Recipe, stages: list[ResolvedStage], output: Path, *, on_cpu: bool) -> None:
    """Checks the fields of every stage's `train`.

    Raises:
        UserError: They conflict with each other, or a package is missing.
    """
    for stage in stages:
        config = stage_config(recipe, stage, output / "stages" / stage.name, on_cpu=on_cpu)
        require_possible(config, where=f"{stage.key}.train")


def check_base(
    recipe: Recipe, stages: list[ResolvedStage], *, exports: bool = True
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Checks that the base can be loaded, takes the adapters of all stages, and can be exported with them.

    Args:
        exports: False for a plan: it may be of another machine, which has the packages and the token of the exports.

    Returns:
        The base's configuration and tokenizer.

    Raises:
        UserError: See `load_config_and_tokenizer`, `check_stack` and `require_exports`.
    """
    base = recipe.base
    config, tokenizer = load_config_and_tokenizer(
        base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    named = recipe.named_evaluation
    first_rounds = {stage.section: stage for stage in reversed(stages)}.values()  # later rounds have equal adapters
    trial = check_stack(
        config,
        {stage.name: lora_config(stage.lora) for stage in reversed(first_rounds)},
        model=base.model,
        merging=recipe.export.merge.enabled,
        ranking=any(stage.type == "ranking" for stage in stages) or bool(named and named.tasks.ranking),
        trust_remote_code=base.trust_remote_code,
    )
    if exports:
        require_exports(recipe, config, tokenizer, trial)
    return config, tokenizer


def base_is_here(base: BaseSettings) -> bool:
    """Whether the base's configuration and tokenizer are on this machine: dry runs and plans download nothing."""
    if base.model.startswith("builtin:") or Path(base.model).exists():
        return True
    try:
        found = [
            try_to_load_from_cache(base.model, name, revision=base.revision)
            for name in ("config.json", "tokenizer_config.json")
        ]
    except HFValidationError:
        return False
    return all(isinstance(file, str) for file in found)
