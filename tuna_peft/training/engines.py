"""Training in several processes: data parallel (DDP), or DeepSpeed's ZeRO-1 and ZeRO-2.

`tuna_peft.training.checkpoint` builds on the mixin here. An optimizer step of ours has several backward passes, and
their number differs between processes. So DeepSpeed is told which pass is the last one; it must not cast weights (the
frozen adapters of a stack keep their dtype); and with ZeRO-2, which exchanges gradients in every pass, `TunaTrainer`
gives all processes the same number of passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tuna_peft.errors import UserError

# Gradients exchanged at once, in elements: 20 MB. DeepSpeed's default of 500 million would allocate 2 GB.
_BUCKET = 5_000_000


class DataParallel(Trainer):
    """Mixin for trainers of a stack in several processes; put it before the trainer class."""

    deepspeed: Any  # the DeepSpeed engine, or None
    model_wrapped: Any

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.deepspeed_plugin is not None:
            # The trainer's arguments decide on dtypes; transformers raises an error if the launcher's differ.
            casts = {"bf16": {"enabled": self.args.bf16}, "fp16": {"enabled": self.args.fp16}}
            self.args.deepspeed_plugin.deepspeed_config.update(casts)
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled or self._zero_stage > 2:
            raise UserError(
                "accelerate's FSDP and DeepSpeed's ZeRO-3 would also shard the adapters, which does not work with a "
                "stack",
                fix="Use `--launch ddp` or ZeRO-2; to shard the base of a recipe, use `--launch fsdp2`.",
            )
        if self.is_deepspeed_enabled:
            self._prepare_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config)

    @property
    def _zero_stage(self) -> int:
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    def _prepare_deepspeed(self, config: dict[str, Any]) -> None:
        """Changes DeepSpeed's configuration before its engine is created."""
        require_fitting_deepspeed(self.args)
        if self.args.bf16:  # autocast instead of a cast of all weights, gradients in the dtype of their weights
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        for cast in ("bf16", "fp16"):
            config[cast] = {"enabled": False}
        config["zero_optimization"].setdefault("reduce_bucket_size", _BUCKET)

    @property
    def exchanges_in_each_pass(self) -> bool:
        """Whether every backward pass communicates with all processes, not only the last of a step."""
        return self._zero_stage == 2

    @contextlib.contextmanager
    def accumulate_gradients(self, model: torch.nn.Module) -> Iterator[None]:
        """For backward passes before the last one of a step: gradients accumulate and are not exchanged yet."""
        state = self.accelerator.gradient_state
        sync_gradients = state.sync_gradients
        state._set_sync_gradients(False)  # accelerate's DeepSpeed wrapper takes an optimizer step where it is True
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(sync_gradients)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Under DeepSpeed, saves a checkpoint directly: `Trainer` would first gather a copy of the whole base, but
        ZeRO-1 and ZeRO-2 do not shard weights."""
        if self.is_deepspeed_enabled and _internal_call:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def release_model(self, model: torch.nn.Module) -> None:
        """Unwraps `model` and frees the optimizer's states and the DeepSpeed engine.

        The states are twice the adapter in fp32, and the trainer object itself stays alive until its caller returns.
        """
        if self.deepspeed is not None:
            # DeepSpeed's own `destroy` leaves these hooks on the model, and they keep the engine alive.
            self.deepspeed.module_forward_pre_hook.remove()
            self.deepspeed.module_forward_post_hook.remove()
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        # accelerate skips models with this mark: the next stage would get no autocast.
        vars(model).pop("_is_accelerate_prepared", None)
        self.model_wrapped, self.deepspeed = model, None
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.accelerator.free_memory()  # also runs the garbage collector and empties the GPU's cache


def require_fitting_deepspeed(args: TrainingArguments) -> None:
    """Checks that DeepSpeed's configuration, if there is one, fits the trainer's.

    Raises:
        UserError: The trainer uses fp16 (ZeRO would clip gradients that still contain the loss scale), or the two
            configurations disagree.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    if args.fp16:
        raise UserError(
            "fp16 under DeepSpeed's ZeRO: it clips gradients before it removes the loss scale",
            fix="Use `--launch ddp`, or bf16 where the GPU has it.",
        )
    for key, ours in (
        ("gradient_accumulation_steps", args.gradient_accumulation_steps),
        ("gradient_clipping", args.max_grad_norm),
    ):
        theirs = plugin.get_value(key, "auto")
        if theirs not in ("auto", ours):
            raise UserError(
                f"DeepSpeed's configuration has {key}: {theirs}, the trainer has {ours}",
                fix=f"Set {key}: auto in DeepSpeed's configuration.",
            )


def require_same_engine(checkpoint: Path, world_size: int, *, deepspeed: bool) -> None:
    """Checks that this run can load the optimizer state of a checkpoint.

    Args:
        checkpoint: The checkpoint's folder.
        world_size: The number of processes of this run.
        deepspeed: Whether this run uses DeepSpeed.

    Raises:
        UserError: Only one of the two runs uses DeepSpeed, or its states were split over another number of processes.
    """
    saved = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if saved != (world_size if deepspeed else 0):
        wrote = f"{saved} processes under DeepSpeed" if saved else "a run without DeepSpeed"
        raise UserError(
            f"the checkpoint's optimizer state was written by {wrote}",
            where=str(checkpoint),
            fix="Use the same --launch and num_processes as then, or delete the checkpoint.",
        )
