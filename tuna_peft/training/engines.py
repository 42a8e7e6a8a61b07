"""Trainers under several processes: plain data parallelism, or DeepSpeed's ZeRO-1 and ZeRO-2, which split what trains.

A step is several backward passes, and not as many in each process. DeepSpeed is therefore told which of them is the
last, it casts nothing (the frozen adapters of a stack stay as they are), and with ZeRO-2, which exchanges gradients in
every pass, all processes run as many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tuna_peft.errors import UserError

# Gradients that travel together, 20 MB. DeepSpeed's own 500 million would take a buffer of 2 GB, whatever is trained.
_BUCKET = 5_000_000


class DataParallel(Trainer):
    """Mixin for trainers of a stack in several processes; put it before the trainer class."""

    deepspeed: Any  # its engine, where it trains
    model_wrapped: Any

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.deepspeed_plugin is not None:  # the trainer chooses dtypes, whatever the launcher was told
            casts = {"bf16": {"enabled": self.args.bf16}, "fp16": {"enabled": self.args.fp16}}
            self.args.deepspeed_plugin.deepspeed_config.update(casts)
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled or self._zero_stage > 2:
            raise UserError(
                "accelerate's FSDP and DeepSpeed's ZeRO-3 shard adapters along with the base, which a stack does not "
                "survive",
                fix="Launch plain data parallelism or ZeRO-2; a recipe shards its base under `--launch fsdp2`.",
            )
        if self.is_deepspeed_enabled:
            self._prepare_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config)

    @property
    def _zero_stage(self) -> int:
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    def _prepare_deepspeed(self, config: dict[str, Any]) -> None:
        """Changes DeepSpeed's configuration before its engine is made."""
        require_fitting_deepspeed(self.args)
        if self.args.bf16:  # autocast instead of a cast of all weights, gradients in the dtype of their weights
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        for cast in ("bf16", "fp16"):
            config[cast] = {"enabled": False}
        config["zero_optimization"].setdefault("reduce_bucket_size", _BUCKET)

    @property
    def exchanges_in_each_pass(self) -> bool:
        """Whether a backward pass takes all processes, be it the last of a step or not."""
        return self._zero_stage == 2

    @contextlib.contextmanager
    def accumulate_gradients(self, model: torch.nn.Module) -> Iterator[None]:
        """A backward pass inside ends no step: its gradients wait for those of the passes after it."""
        state = self.accelerator.gradient_state
        ends_step = state.sync_gradients
        state._set_sync_gradients(False)  # DeepSpeed steps by it
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(ends_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint under DeepSpeed without a copy of the whole base: ZeRO-1 and ZeRO-2 leave all weights whole."""
        if self.is_deepspeed_enabled and _internal_call:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def release_model(self, model: torch.nn.Module) -> None:
        """Takes from `model` what this trainer put around it, and lets go of its engine and its optimizer's states.

        The trainer itself lives until its caller is done, and those states are twice the adapter in fp32.
        """
        if self.deepspeed is not None:
            # DeepSpeed forgets these when it takes its engine down, and through them the engine would stay.
            self.deepspeed.module_forward_pre_hook.remove()
            self.deepspeed.module_forward_post_hook.remove()
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(model).pop("_is_accelerate_prepared", None)  # else the next stage would get no autocast
        self.model_wrapped, self.deepspeed = model, None
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.accelerator.free_memory()  # collects, and empties the GPU's cache


def require_fitting_deepspeed(args: TrainingArguments) -> None:
    """Refuses what DeepSpeed's configuration, if there is one, and that of a trainer cannot do together.

    Raises:
        UserError: fp16, since its ZeRO would clip gradients that still have the loss scale in them; or the two
            disagree.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    if args.fp16:
        raise UserError(
            "DeepSpeed's ZeRO clips gradients before it takes the loss scale of fp16 off",
            fix="Use `--launch ddp`, or bf16 where the GPU has it.",
        )
    for key, ours in (
        ("gradient_accumulation_steps", args.gradient_accumulation_steps),
        ("gradient_clipping", args.max_grad_norm),
    ):
        theirs = plugin.get_value(key, "auto")
        if theirs not in ("auto", ours):
            raise UserError(
                f"DeepSpeed's configuration says {key}: {theirs}, where this trainer has {ours}",
                fix=f"Set {key}: auto there.",
            )


def require_same_engine(checkpoint: Path, world_size: int, *, deepspeed: bool) -> None:
    """Refuses a checkpoint whose optimizer state this run cannot take up.

    Args:
        world_size: The number of processes.
        deepspeed: Whether they run under DeepSpeed.

    Raises:
        UserError: DeepSpeed wrote it and does not run, the other way around, or it was split over other processes.
    """
    saved = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if saved != (world_size if deepspeed else 0):
        wrote = f"{saved} processes under DeepSpeed" if saved else "a run without DeepSpeed"
        raise UserError(
            f"its optimizer state was written by {wrote}",
            where=str(checkpoint),
            fix="Go on with the --launch and num_processes of then, or delete the checkpoint.",
        )
