"""One stage: a new adapter on the frozen stack, trained by TRL's SFT or by the Tuna trainer, resumable."""

from __future__ import annotations

import contextlib
import logging
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
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.measure import Peak
from tuna_peft.run.sharding import under_deepspeed, world_size
from tuna_peft.training.checkpoint import StopOnRequest, latest_checkpoint
from tuna_peft.training.config import TunaConfig, mixed_precision, use_one_gpu
from tuna_peft.training.curves import save_curves
from tuna_peft.training.engines import require_fitting_deepspeed, require_same_engine
from tuna_peft.training.progress import StageProgress
from tuna_peft.training.sft import StackSFTTrainer
from tuna_peft.training.trainer import TunaTrainer

logger = logging.getLogger("tuna_peft")

_ECHO = 2.0  # seconds in which a launcher has passed on a Ctrl-C


def train_stage(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    recipe: Recipe,
    stage: ResolvedStage,
    folder: Path,
) -> tuple[PeftModel, dict[str, Any]]:
    """Trains the adapter of `stage` on top of `model`, from the last complete checkpoint in `folder` if there is one.

    A round that continues an adapter replaces the top one, from whose weights it starts.

    Args:
        rows: Encoded rows, see `tuna_peft.data.tokenize`.
        folder: Gets the checkpoints, `log_history.json` and `curves.png`.

    Returns:
        The model with the new adapter on top, and what the report says of the stage.

    Raises:
        KeyboardInterrupt: After Ctrl-C, with a checkpoint of the step that was finished.
    """
    set_seed(recipe.seed)  # the adapter's first weights are random
    lora = stage.lora
    stacked = push_adapter(
        model,
        stage.name,
        LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
            use_rslora=lora.use_rslora, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    if stage.replaces:
        take_over(stacked)
    keep_from_ddp(stacked)
    config = stage_config(recipe, stage, folder, on_cpu=stacked.device.type == "cpu")
    stop, progress = StopOnRequest(), StageProgress(stage.name)
    trainer = _trainer(stacked, config, tokenizer, rows, [stop, progress])
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        require_same_engine(checkpoint, config.world_size, deepspeed=trainer.is_deepspeed_enabled)
        logger.info("stage %s goes on from %s", stage.name, checkpoint.name)
    started, peak = time.monotonic(), Peak(stacked.device)
    with _stop_on_ctrl_c(stop), contextlib.closing(progress):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = trainer.state.log_history
    if trainer.is_world_process_zero():
        write_json(folder / "log_history.json", history)
        save_curves(history, folder / "curves.png", title=f"{recipe.name}: {stage.name}")
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    summary = {
        "type": stage.type,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": result.training_loss,
        "tokens": _tokens(trainer),
        "seconds": round(time.monotonic() - started, 2),
        "resumed_from": checkpoint.name if checkpoint else None,
        **peak.as_dict(),
        "trainable_parameters": sum(p.numel() for p in stacked.parameters() if p.requires_grad),
        "lora": lora.model_dump(),
    }
    return _released(trainer, stacked), summary


def stage_config(recipe: Recipe, stage: ResolvedStage, folder: Path, *, on_cpu: bool) -> SFTConfig | TunaConfig:
    """The trainer's configuration of `stage`.

    Raises:
        UserError: Its fields do not go together.
    """
    settings: dict[str, Any] = {
        "report_to": "none",
        "save_total_limit": 1,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,  # every adapter weight is used, and looking for others costs a pass
        **stage.given,
        "output_dir": str(folder),
        "run_name": f"{recipe.name}-{stage.name}",
        "disable_tqdm": True,  # StageProgress shows one bar of its own
        "seed": recipe.seed,
        # Accelerate runs DeepSpeed only where a GPU could be.
        **({"ddp_backend": "gloo"} if on_cpu and under_deepspeed() else {"use_cpu": on_cpu}),
    }
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__:  # its older name warns
        settings.setdefault("activation_checkpointing", settings.pop("gradient_checkpointing", True))
    if stage.type == "sft" and not {"bf16", "fp16"} & set(settings):
        settings["bf16"], settings["fp16"] = mixed_precision(on_cpu)
    try:
        if stage.type == "ranking":
            config = TunaConfig(**settings)
        else:
            config = SFTConfig(**{"completion_only_loss": True, **settings})
            use_one_gpu(config)
    except (ValueError, TypeError) as error:
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
    trainer.remove_callback(PrinterCallback)  # StageProgress shows what it would print
    return trainer


def _released(trainer: StackSFTTrainer | TunaTrainer, model: PeftModel) -> PeftModel:
    """Takes from the model what this trainer put around it, so that the next one starts from the same."""
    trainer.release_model(model)
    checkpoint_activations(model, False)
    model.disable_input_require_grads()
    model.requires_grad_(False)
    model.eval()
    return model


def _tokens(trainer: StackSFTTrainer | TunaTrainer) -> int | None:
    if isinstance(trainer, TunaTrainer):
        return int(trainer.state.num_input_tokens_seen)
    return next((int(e["num_tokens"]) for e in reversed(trainer.state.log_history) if "num_tokens" in e), None)


@contextlib.contextmanager
def _stop_on_ctrl_c(stop: StopOnRequest) -> Iterator[None]:
    """The first Ctrl-C finishes the step and saves; the second one interrupts at once.

    A launcher passes on the Ctrl-C that its processes have had already; that does not count as a second one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked: float | None = None

    def request(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked is None:
            stop.requested, asked = True, time.monotonic()
            print("\nStopping after this step, with a checkpoint (Ctrl-C again: at once) ...", flush=True)
        elif world_size() == 1 or time.monotonic() > asked + _ECHO:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
