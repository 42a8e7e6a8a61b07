"""Trains one stage: a new adapter on top of the frozen stack, with TRL's SFT trainer or the Tuna trainer.

`tuna_peft.run.pipeline` calls `stage_config` to check the settings before anything is loaded, and `train_stage` to
train; the latter resumes from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig

from tuna_peft.errors import UserError
from tuna_peft.files import write_json
from tuna_peft.models.base.shards import keep_from_ddp
from tuna_peft.models.forward.checkpointing import checkpoint_activations
from tuna_peft.models.stack.adapters import push_adapter, take_over
from tuna_peft.models.stack.start import start_from_below
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.recipe.schema import LoraSettings, Recipe
from tuna_peft.run.metrics_file import METRICS, MetricsFile, finite
from tuna_peft.run.sharding import under_deepspeed, world_size
from tuna_peft.run.trackers import own_wandb_run
from tuna_peft.terminal import echo
from tuna_peft.training.checkpoint import StopOnRequest
from tuna_peft.training.config import TunaConfig, mixed_precision, use_one_gpu
from tuna_peft.training.engines import require_fitting_deepspeed, require_same_engine
from tuna_peft.training.learning_rate import auto_learning_rate
from tuna_peft.training.progress import StageProgress
from tuna_peft.training.resume import checkpoints, latest_checkpoint
from tuna_peft.training.sft import StackSFTTrainer
from tuna_peft.training.trainer import TunaTrainer

logger = logging.getLogger("tuna_peft")

# Ctrl-C reaches all processes of a terminal, and the launcher then sends it to its processes again: a second signal
# within this many seconds is the same Ctrl-C.
_REPEATED_CTRL_C = 2.0


def train_stage(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    recipe: Recipe,
    stage: ResolvedStage,
    folder: Path,
) -> tuple[PeftModel, dict[str, Any]]:
    """Trains the adapter of `stage` on top of `model`, from the last complete checkpoint in `folder` if there is one.

    With `stage.replaces`, the new adapter starts from the weights of the top adapter and replaces it.

    Args:
        rows: Encoded training examples, see `tuna_peft.data.tokenize`.
        folder: `stages/<name>` in the run's folder: for checkpoints, `log_history.json` and `curves.png`.

    Returns:
        The model with the new adapter on top, and a summary of the training for the report.

    Raises:
        KeyboardInterrupt: After Ctrl-C. The current step was finished and saved as a checkpoint.
    """
    set_seed(recipe.seed)  # the initial weights of the adapter are random
    lora = stage.lora
    stacked = push_adapter(
        model,
        stage.name,
        lora_config(lora),
    )
    if stage.replaces:
        take_over(stacked)
    elif lora.start == "below":
        start_from_below(stacked)
    keep_from_ddp(stacked)
    hidden_size = stacked.config.get_text_config().hidden_size
    config = stage_config(recipe, stage, folder, on_cpu=stacked.device.type == "cpu", hidden_size=hidden_size)
    stop, progress = StopOnRequest(), StageProgress(stage.name)
    metrics = MetricsFile(folder.parents[1] / METRICS, stage.name)
    trainer = _trainer(stacked, config, tokenizer, rows, [stop, LogFirstAndLast(), progress, metrics])
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        require_same_engine(checkpoint, config.world_size, deepspeed=trainer.is_deepspeed_enabled)
        logger.info("stage %s resumes from %s", stage.name, checkpoint.name)
    with _stop_on_ctrl_c(stop), contextlib.closing(progress), own_wandb_run():
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = [finite(entry) for entry in trainer.state.log_history]
    if trainer.is_world_process_zero():
        # Not at the top: matplotlib builds a cache of fonts on first use, which plans and dry runs need not wait for.
        from tuna_peft.evaluation.report.curves import save_curves

        write_json(folder / "log_history.json", history)
        save_curves(history, folder / "curves.png", title=f"{recipe.name}: {stage.name}")
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.wait_for_everyone()  # a launcher ends all processes once the first one has ended
        raise KeyboardInterrupt
    if trainer.is_world_process_zero() and "save_total_limit" not in stage.train_overrides:
        for earlier in checkpoints(folder)[1:]:
            shutil.rmtree(earlier, ignore_errors=True)
    summary = {
        "type": stage.type,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": result.training_loss,
        "tokens": _tokens(trainer),
        "seconds": round(trainer.totals.seconds(), 2),
        "resumed_from": checkpoint.name if checkpoint else None,
        "peak_memory_gib": round(trainer.totals.peak_memory() / 2**30, 3),
        "peak_memory_of": "cuda" if stacked.device.type == "cuda" else "process",
        "trainable_parameters": sum(p.numel() for p in stacked.parameters() if p.requires_grad),
        "lora": lora.model_dump(),
        **{f"auto_{name}": getattr(config, name) for name in ("learning_rate", "margin") if stage.is_auto(name)},
    }
    return _released(trainer, stacked), summary


def lora_config(lora: LoraSettings) -> LoraConfig:
    """PEFT's configuration for these settings."""
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        use_rslora=lora.use_rslora, task_type="CAUSAL_LM",
    )  # fmt: skip


def stage_config(
    recipe: Recipe, stage: ResolvedStage, folder: Path, *, on_cpu: bool, hidden_size: int | None = None
) -> SFTConfig | TunaConfig:
    """The trainer's configuration for `stage`: our defaults, then the recipe's fields, then what every run fixes.

    Args:
        hidden_size: Width of the model, for `learning_rate: auto`; None, before it is known, takes a default.

    Raises:
        UserError: The recipe's fields conflict with each other.
    """
    settings: dict[str, Any] = {
        "report_to": "none",
        "save_total_limit": 2,  # one to resume from where the newest is damaged
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,  # all trained weights are used; searching would cost time in every pass
        **stage.train_overrides,
        "output_dir": str(folder),
        "run_name": f"{recipe.name}-{stage.name}",
        "disable_tqdm": True,  # StageProgress shows a progress bar instead
        "seed": recipe.seed,
        # Accelerate 1.15 ignores DeepSpeed if it is told to use the CPU: it is told which backend to use instead.
        **({"ddp_backend": "gloo"} if on_cpu and under_deepspeed() else {"use_cpu": on_cpu}),
    }
    if stage.type == "sft" and settings.get("learning_rate") == "auto":  # `TunaTrainer` chooses its own
        del settings["learning_rate"]
        if hidden_size is not None:
            settings["learning_rate"] = auto_learning_rate(hidden_size, ranking=False)
            logger.info("learning_rate auto: %.2g", settings["learning_rate"])
    # transformers 5.18 renamed the field; its old name prints a warning.
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__:
        settings.setdefault("activation_checkpointing", settings.pop("gradient_checkpointing", True))
    if stage.type == "sft" and not {"bf16", "fp16"} & set(settings):
        settings["bf16"], settings["fp16"] = mixed_precision(on_cpu)
    try:
        if stage.type == "ranking":
            config = TunaConfig(**settings)
        else:
            config = SFTConfig(**{"completion_only_loss": True, **settings})
            use_one_gpu(config)  # `TunaConfig` does this itself
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error), where=f"{stage.key}.train", fix="Change these fields in the recipe.") from error
    require_fitting_deepspeed(config)
    return config


def _trainer(
    model: PeftModel,
    config: SFTConfig | TunaConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    callbacks: list[TrainerCallback],
) -> StackSFTTrainer | TunaTrainer:
    kind: Any = TunaTrainer if isinstance(config, TunaConfig) else StackSFTTrainer
    trainer = kind(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)  # it would print the metrics again that StageProgress shows
    return trainer


def _released(trainer: StackSFTTrainer | TunaTrainer, model: PeftModel) -> PeftModel:
    """Undoes what the trainer changed in the model, so that evaluation and the next stage find it as it was.

    Trainers wrap the model's `forward` for mixed precision, and switch on gradient checkpointing, for which they let
    the embeddings' outputs require gradients.
    """
    trainer.release_model(model)
    checkpoint_activations(model, False)
    model.disable_input_require_grads()
    model.requires_grad_(False)
    model.eval()
    return model


def _tokens(trainer: StackSFTTrainer | TunaTrainer) -> int | None:
    """Number of tokens that the stage was trained on; None if the trainer did not log it."""
    if isinstance(trainer, TunaTrainer):
        return int(trainer.state.num_input_tokens_seen)
    return next((int(e["num_tokens"]) for e in reversed(trainer.state.log_history) if "num_tokens" in e), None)


class LogFirstAndLast(TrainerCallback):
    """Logs the first and the last step whatever `logging_steps` is: even a run of three steps has two losses then."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Requests the log."""
        if state.global_step in (1, state.max_steps):
            control.should_log = True


@contextlib.contextmanager
def _stop_on_ctrl_c(stop: StopOnRequest) -> Iterator[None]:
    """The first Ctrl-C stops training after the current step, with a checkpoint; a second one interrupts immediately.

    SIGTERM, which schedulers send before they kill, counts as Ctrl-C.

    Under a launcher a second signal right after the first one is ignored: it is the same Ctrl-C.
    """
    # Python allows signal handlers in the main thread only; notebooks and servers may train in another one.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first: float | None = None

    def request(signum: int, frame: Any) -> None:
        nonlocal first
        if first is None:
            stop.requested, first = True, time.monotonic()
            echo("\nStopping after this step, with a checkpoint (Ctrl-C again: immediately) ...")
        elif world_size() == 1 or time.monotonic() > first + _REPEATED_CTRL_C:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
