"""What a run checks before any weight is loaded: from the recipe, the base's configuration and tokenizer.

`tuna_peft.run.pipeline` and `tuna_peft.run.dry_run` call the first two functions, so that a recipe that passes
`--dry-run` is not refused by the run for the same reasons; `tuna-peft plan`, which may be for another machine, checks
the adapters only. The data is read elsewhere (`tuna_peft.run.inputs`).
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.models.base.load import load_config_and_tokenizer, resolve_model_path
from tuna_peft.models.base.stored_weights import require_readable_weights
from tuna_peft.models.stack.trial import check_stack
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.recipe.schema import Recipe
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


def check_base(recipe: Recipe, stages: list[ResolvedStage]) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Checks that the base can be loaded, takes the adapters of all stages, and can be exported with them.

    Returns:
        The base's configuration and tokenizer.

    Raises:
        UserError: See `load_config_and_tokenizer`, `check_adapters`, `require_exports` and `require_readable_weights`.
    """
    base = recipe.base
    config, tokenizer = load_config_and_tokenizer(
        base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    require_exports(recipe, config, tokenizer, check_adapters(recipe, stages, config))
    require_readable_weights(resolve_model_path(base.model), base.revision)
    return config, tokenizer


def check_adapters(recipe: Recipe, stages: list[ResolvedStage], config: PretrainedConfig) -> PeftModel:
    """Checks that the base takes the adapters of all stages, see `check_stack`.

    Returns:
        The base with the adapters, without weights.
    """
    named = recipe.named_evaluation
    first_rounds = {stage.section: stage for stage in reversed(stages)}.values()  # later rounds have equal adapters
    return check_stack(
        config,
        {stage.name: lora_config(stage.lora) for stage in reversed(first_rounds)},
        model=recipe.base.model,
        merging=recipe.export.merge.enabled,
        ranking=any(stage.type == "ranking" for stage in stages) or bool(named and named.tasks.ranking),
        trust_remote_code=recipe.base.trust_remote_code,
    )
