"""What a run and a dry run check before any weight is loaded: from the recipe, the base's configuration and tokenizer.

`tuna_peft.run.pipeline` and `tuna_peft.run.dry_run` call the same two functions, so that a recipe that passes
`--dry-run` is not refused by the run for the same reasons. The data is read elsewhere (`tuna_peft.run.inputs`).
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tuna_peft.models.base.load import load_config_and_tokenizer, require_unquantized
from tuna_peft.models.forward.segments import layer_windows
from tuna_peft.models.stack.trial import trial_stack
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
        UserError: See `load_config_and_tokenizer`, `require_unquantized`, `trial_stack` and `require_exports`.
    """
    base = recipe.base
    config, tokenizer = load_config_and_tokenizer(
        base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    require_unquantized(config, base.model, merging=recipe.export.merge.enabled)
    named = recipe.named_evaluation
    if any(stage.type == "ranking" for stage in stages) or named and named.tasks.ranking:
        layer_windows(config.get_text_config())
    first_rounds = {stage.section: stage for stage in reversed(stages)}.values()  # later rounds have equal adapters
    adapters = {stage.name: lora_config(stage.lora) for stage in reversed(first_rounds)}
    trial = trial_stack(config, adapters, trust_remote_code=base.trust_remote_code)
    require_exports(recipe, config, tokenizer, trial)
    return config, tokenizer
