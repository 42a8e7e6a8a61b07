"""Describes what a run would do without loading a model, for `tuna-peft run --dry-run`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from tuna_peft.data.config import DataSource, Overflow
from tuna_peft.data.load import encode_source, iterate_ranked, load_prompts
from tuna_peft.data.losses import describe_losses
from tuna_peft.data.ranked import ReadReport
from tuna_peft.data.sources import is_here
from tuna_peft.data.texts import set_template_date
from tuna_peft.graders import require_module
from tuna_peft.models.base.hub_files import files_here
from tuna_peft.models.base.load import resolve_device
from tuna_peft.planning.prompt_check import warn_of_default_template
from tuna_peft.recipe.dump import diff_recipes, dump_recipe
from tuna_peft.recipe.evaluation_schema import RankingTask
from tuna_peft.recipe.export_notes import export_notes
from tuna_peft.recipe.reach import addresses, foreign_code, unusual_variables
from tuna_peft.recipe.resolved import ResolvedStage, resolve_stages
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.checks import check_base, check_options
from tuna_peft.run.folder import as_in_folder, read_run_recipe
from tuna_peft.run.inputs import read_prompts
from tuna_peft.run.rank_samples import check_feedback

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    Loaded = tuple[PretrainedConfig, PreTrainedTokenizerBase]


def describe_recipe(recipe: Recipe, output: Path) -> RenderableType:
    """The resolved recipe, then each step with its data, its size and how far it has got in `output`.

    Checks what the run checks before it loads weights, if the base is on this machine, and reads local data like the
    run does, so that a bad record is found here too.

    Raises:
        UserError: The data, an option, or the base cannot be used.
    """
    existing = read_run_recipe(output)
    recipe = as_in_folder(recipe, output)
    stages = resolve_stages(recipe)
    check_options(recipe, stages, output, on_cpu=resolve_device(recipe.base.device).type == "cpu")
    for name, where in _functions(recipe):
        require_module(name, where)
    loaded = None
    if files_here(recipe.base.model, recipe.base.revision, "config.json", "tokenizer_config.json"):
        loaded = check_base(recipe, stages)
        set_template_date(loaded[1], recipe.prompt.date)
        warn_of_default_template(recipe, loaded[1])
    parts: list[RenderableType] = [
        Text(dump_recipe(recipe)),
        _steps(recipe, output, loaded),
    ]
    if existing and (changed := diff_recipes(existing, recipe)):
        lines = "".join(f"\n  {line}" for line in changed)
        parts.append(Text(f"{output} holds a run of another recipe and would be rejected:{lines}", style="red"))
    return Group(*parts)


def _functions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The Python functions that the recipe names, each with its key."""
    for stage in recipe.stages:
        if stage.feedback and stage.feedback.judge and stage.feedback.judge.function:
            yield stage.feedback.judge.function, f"stages.{stage.name}.data.judge.function"
    tasks = recipe.named_evaluation.tasks if recipe.named_evaluation else None
    if tasks and tasks.graded:
        yield tasks.graded.grader, "evaluation.tasks.graded.grader"
    if tasks and tasks.vicuna and tasks.vicuna.judge.function:
        yield tasks.vicuna.judge.function, "evaluation.tasks.vicuna.judge.function"


def _steps(recipe: Recipe, output: Path, loaded: Loaded | None) -> Text:
    text = Text(f"What `run` would do in {output}:\n", style="bold")

    def step(title: str, *lines: str | None) -> None:
        text.append(f"\n{title}\n", style="bold cyan")
        text.append("".join(f"  {line}\n" for line in lines if line), style="not bold")

    quantization = recipe.quantization
    stored: str = "unquantized" if quantization.method == "none" else quantization.method
    if quantization.method in ("nf4", "fp4") and quantization.double_quant:
        stored += ", double quantization"
    if lines := [*foreign_code(recipe), *addresses(recipe)]:
        step("beyond this package", *lines, _asks(recipe))
    step("base", f"{recipe.base.model}, {stored}")
    for stage in resolve_stages(recipe):
        rows, losses = _stage_rows(stage, recipe, loaded)
        # With packing, the number of packed sequences is only known when the trainer has made them.
        steps = None if rows is None or stage.train.get("packing") else stage.update_steps(rows)
        step(
            f"stage {stage.name} ({stage.type}): {_state(output, stage)}",
            _adapter(stage),
            _data(stage.source, rows),
            *losses,
            *_ranking(stage),
            f"about {steps:,} optimizer steps" if steps else None,
        )
    if recipe.evaluation == "auto":
        step(
            "evaluation auto, before the first stage and after each stage",
            "prompts of ranked lists, held back from training",
        )
    for name, task in (recipe.named_evaluation.tasks.given() if recipe.named_evaluation else {}).items():
        described: list[str | None] = [getattr(task, "path", None)]
        if isinstance(task, DataSource):
            limits = (task.max_length, task.overflow, False, False) if isinstance(task, RankingTask) else None
            rows, losses = _rows(task, recipe, loaded, limits)
            described = [_data(task, rows), *losses]
        step(f"task {name}, before the first stage and after each stage", *described)
    export = recipe.export
    merged = f"merged {export.merge.dtype} model on the {export.merge.base} base" if export.merge.enabled else None
    nearer = ", from the nearer of both bases" if export.gguf_base == "auto" else ""
    gguf = f"GGUF: {', '.join(export.gguf)}{nearer}" if export.gguf else None
    push = export.push
    visible = "private" if push and push.private else "public"
    pushed = f"{push.what} to the {visible} {push.repo} on the Hub" if push else None
    combined = "combined adapter" if export.combine else None
    step("export", "stack of adapters", combined, merged, gguf, pushed, *export_notes(recipe))
    return text


def _asks(recipe: Recipe) -> str | None:
    names = unusual_variables(recipe)
    return f"asks before it sends {' and '.join(names)}, unless --yes is given" if names else None


def _adapter(stage: ResolvedStage) -> str:
    lora = stage.lora
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    on = f"on the frozen {' + '.join(stage.below)}" if stage.below else "on the base"
    continues = f", starting from {stage.replaces}, which it replaces" if stage.replaces else ""
    return f"LoRA r={lora.r} alpha={lora.alpha} ({modules}) {on}{continues}"


def _stage_rows(stage: ResolvedStage, recipe: Recipe, loaded: Loaded | None) -> tuple[int | None, list[str]]:
    if stage.feedback is not None:
        if not is_here(stage.source.path):
            return None, []
        tokenizer = loaded[1] if loaded else None
        rows, report = read_prompts(stage, recipe.prompt, tokenizer)
        if tokenizer is not None:
            check_feedback(stage, rows, tokenizer, online=False)
        return report.kept, describe_losses(report.as_dict())
    limits = (stage.max_length, stage.overflow, stage.needs_reference, stage.needs_scores)
    return _rows(stage.source, recipe, loaded, limits, supervised=stage.type == "sft")


def _rows(
    source: DataSource,
    recipe: Recipe,
    loaded: Loaded | None,
    limits: tuple[int | None, Overflow, bool, bool] | None,
    *,
    supervised: bool = False,
) -> tuple[int | None, list[str]]:
    """Number of usable rows, and what is left out; None for a Hub data set, which a dry run does not download.

    Args:
        loaded: Configuration and tokenizer of the base, which decide what is too long; None counts before that limit.
        limits: Maximum length, overflow policy, whether references and scores are needed; None reads only
            prompts.
        supervised: One response is enough.
    """
    if not is_here(source.path):
        return None, []
    if limits is None:
        prompts = load_prompts(source, recipe.prompt)[1]
        return prompts.kept, describe_losses(prompts.as_dict())
    if loaded is None:
        read = ReadReport()
        deque(iterate_ranked(source, recipe.prompt, read, pairs=not supervised), maxlen=0)
        return read.kept, [*describe_losses(read.as_dict()), "counted before the length limit: no tokenizer here"]
    (config, tokenizer), (max_length, overflow, needs_reference, needs_scores) = loaded, limits
    rows, counts = encode_source(
        source, recipe.prompt, tokenizer, config, supervised=supervised,
        max_length=max_length, overflow=overflow, needs_reference=needs_reference, needs_scores=needs_scores,
    )  # fmt: skip
    return len(rows), describe_losses(counts)


def _ranking(stage: ResolvedStage) -> Iterator[str]:
    """How the run samples and ranks responses, a line for each step; no lines if the data has ranks already."""
    if (source := stage.feedback) is None:
        return
    if (sample := source.sample) is not None:
        model = stage.samples_from[-1] if stage.samples_from else "base"
        by = f"by the server {sample.server.base_url}" if sample.server else sample.backend
        yield (
            f"samples {sample.n} responses per prompt from {model}, at temperature {sample.temperature:g}, "
            f"in {sample.trials} attempts at most ({by})"
        )
    if (judge := source.judge) is not None:
        who = judge.function or judge.model or (judge.server and f"{judge.server.model} at {judge.server.base_url}")
        yield f"ranked by the judge {who}" + (", in both orders" if judge.both_orders else "")
    if (score := source.score) is not None:
        who = score.model or (score.server and f"{score.server.model} at {score.server.base_url}")
        generated = f", which generates {score.generate.n} responses itself" if score.generate else ""
        yield f"ranked by the log-probabilities of {who}{generated}"
    if stage.type == "sft":
        yield "trains on the best response of each list"


def _data(source: DataSource, rows: int | None) -> str:
    split = "" if source.split == "train" else f"[{source.split}]"
    return f"{source.title}{split}: {'on the Hub, not counted' if rows is None else f'{rows:,} rows'}"


def _state(output: Path, stage: ResolvedStage) -> str:
    from tuna_peft.training.resume import latest_checkpoint

    folder = output / "stages" / stage.name
    if (folder / "done.json").is_file():
        return "finished, will be skipped"
    checkpoint = latest_checkpoint(folder)
    return f"resumes from {checkpoint.name}" if checkpoint else "trains"
